"""`TransformersDecoder` computes what transformers does, over our cache, whatever the backbone."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_engine_kernels import ops
from transformers import (
    DeepseekV2Config,
    Dots1Config,
    Gemma4Config,
    Gemma4TextConfig,
    GPT2Config,
    JetMoeConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PhiConfig,
    PhimoeConfig,
)

from backbones import FULL, OTHER_BACKBONES, SLIDING, WINDOW
from checkpoints import make_llava, text_config, vision_config
from decoding import (
    layers_of,
    make_context,
    make_decoder,
    run_paged,
    transformers_logits,
    weights_of,
)
from mm_engine.config import EngineConfig
from mm_engine.models import TransformersDecoder, build_decoder
from mm_engine.models.layers import pack_linears
from mm_engine.models.transformers_attention import IMPLEMENTATION
from mm_engine.models.transformers_parts import CalledLinear, keep_float32
from mm_engine.models.weights import fill_random
from mm_engine.worker.loader import load_model, open_model

SIZES: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
}
#: Special in ways that the backbones of the parity test aren't.
MORE: dict[str, Any] = {
    "values-smaller-than-keys": lambda: DeepseekV2Config(
        **SIZES,
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        head_dim=8,
        v_head_dim=12,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
    ),
    "heads-of-two-sizes": lambda: Gemma4TextConfig(
        **SIZES,
        head_dim=16,
        global_head_dim=24,
        layer_types=[SLIDING, FULL],
        sliding_window=WINDOW,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=384,
    ),
    "learned-positions": lambda: GPT2Config(
        vocab_size=384, n_positions=64, n_embd=64, n_layer=2, n_head=4
    ),
    "window-in-the-mask-only": lambda: PhimoeConfig(
        **SIZES, sliding_window=WINDOW, num_local_experts=4
    ),
    "experts-in-attention": lambda: JetMoeConfig(
        **{**SIZES, "num_key_value_heads": 2},
        kv_channels=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    ),
}


def config_of(name: str) -> Any:
    return MORE[name]() if name in MORE else text_config(name)


def some_ids(num: int = 40) -> torch.Tensor:
    return torch.randint(4, 384, (num,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", [*OTHER_BACKBONES, *MORE])
def test_logits_in_chunks_are_transformers(name: str) -> None:
    config, ids = config_of(name), some_ids()
    decoder = make_decoder(config)
    expected = transformers_logits(decoder, config, ids)
    assert expected.std() > 0.01
    got = run_paged(decoder, ids, [13, 1, 1, 17, 8])
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=float(1e-4 * expected.std()))


@pytest.mark.parametrize(
    ("name", "windows", "softcap", "scale"),
    [
        ("gemma2", [WINDOW, None], 1.5, 10**-0.5),
        ("cohere2", [WINDOW, None, WINDOW, None], None, 0.25),
        ("gemma3", [WINDOW, WINDOW, None], None, 10**-0.5),
        ("phi3", [WINDOW, WINDOW], None, 0.25),
        ("granite", [None, None], None, 0.1),
    ],
)
def test_layers_get_what_the_model_asks_of_attention(
    name: str, windows: list[int | None], softcap: float | None, scale: float
) -> None:
    layers = layers_of(make_decoder(text_config(name)))
    assert [layer.sliding_window for layer in layers] == windows
    assert {layer.softcap for layer in layers} == {softcap}
    assert [layer.scale for layer in layers] == pytest.approx([scale] * len(windows))


def test_a_window_that_no_sequence_fills_is_none() -> None:
    layers = layers_of(make_decoder(text_config("phi3"), max_model_len=WINDOW))
    assert [layer.sliding_window for layer in layers] == [None, None]


def test_the_configs_own_object_stays_as_it_is() -> None:
    config = text_config("gemma2")
    before = config.to_dict()
    make_decoder(config)
    assert config.to_dict() == before
    assert config._attn_implementation != IMPLEMENTATION


def test_embeddings_are_scaled_as_transformers_scales_them() -> None:
    decoder, ids = make_decoder(text_config("gemma2")), torch.tensor([5, 0, 9])
    plain = weights_of(decoder)["embed_tokens.weight"][ids]
    torch.testing.assert_close(decoder.embed_tokens(ids), plain * 8.0)  # sqrt(64)


def test_a_tied_head_is_the_embeddings_until_it_is_untied() -> None:
    decoder = make_decoder(text_config("gemma2", tie_word_embeddings=True))
    embeddings = weights_of(decoder)["embed_tokens.weight"]
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    assert decoder.lm_head is None
    assert "lm_head.weight" not in weights_of(decoder)
    expected = 3.0 * torch.tanh(hidden @ embeddings.T / 3.0)  # final_logit_softcapping
    torch.testing.assert_close(decoder.compute_logits(hidden), expected)
    head = decoder.untie()
    head.weight.data.copy_(embeddings * 2)
    assert decoder.lm_head is head
    expected = 3.0 * torch.tanh(hidden @ embeddings.T * 2 / 3.0)
    torch.testing.assert_close(decoder.compute_logits(hidden), expected)


def whole(config_class: type[Any], text: Any, **changes: Any) -> Any:
    """The config of a model of images and text around a backbone."""
    config = config_class(vision_config=vision_config("siglip"), **changes)
    config.text_config = text
    return config


def logits_of(config: Any, hf_config: Any) -> tuple[TransformersDecoder, torch.Tensor]:
    """A decoder with random weights, and its plain logits of some hidden states."""
    ctx = dataclasses.replace(make_context(config), hf_config=hf_config)
    decoder = TransformersDecoder(config, ctx)
    fill_random(decoder, seed=0)
    head: Any = decoder.lm_head
    head.weight.data *= 20
    return decoder, HIDDEN @ head.weight.T


HIDDEN = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("gemma2", lambda plain: 3.0 * torch.tanh(plain / 3.0)),
        ("cohere2", lambda plain: plain * 0.25),
        ("granite", lambda plain: plain / 4.0),
    ],
)
def test_logits_are_scaled_where_the_model_that_transformers_runs_scales_them(
    name: str, after: Any
) -> None:
    config = text_config(name, tie_word_embeddings=False)
    decoder, plain = logits_of(config, config)  # the checkpoint is the causal model itself
    assert decoder.composite is None
    torch.testing.assert_close(decoder.compute_logits(HIDDEN), after(plain))
    decoder, plain = logits_of(config, whole(LlavaConfig, config))  # around it: a plain head
    torch.testing.assert_close(decoder.compute_logits(HIDDEN), plain)


def test_logits_are_capped_by_a_composite_model_that_caps_them() -> None:
    text = MORE["heads-of-two-sizes"]()
    text.final_logit_softcapping, text.tie_word_embeddings = 3.0, False
    hf_config = Gemma4Config(text_config=text.to_dict(), tie_word_embeddings=False)
    decoder, plain = logits_of(hf_config.text_config, hf_config)
    assert decoder.composite is not None
    torch.testing.assert_close(decoder.compute_logits(HIDDEN), 3.0 * torch.tanh(plain / 3.0))


def test_the_composite_models_head_decides_about_a_bias() -> None:
    config = PhiConfig(**SIZES)
    decoder, _ = logits_of(config, config)
    assert "lm_head.bias" in weights_of(decoder)
    decoder, plain = logits_of(config, whole(LlavaConfig, config))
    assert "lm_head.bias" not in weights_of(decoder)
    torch.testing.assert_close(decoder.compute_logits(HIDDEN), plain)


def test_a_composite_model_takes_no_memory_and_brings_no_weights() -> None:
    config = text_config("gemma2")
    alone, _ = logits_of(config, config)
    decoder, _ = logits_of(config, whole(LlavaConfig, config))
    assert decoder.composite is not None
    decoder.compute_logits(HIDDEN)
    assert weights_of(decoder).keys() == weights_of(alone).keys()
    own = set(decoder.parameters())
    others = {p for p in decoder.composite.model.parameters() if p not in own}
    assert others and all(parameter.is_meta for parameter in others)


def test_a_composite_model_that_needs_more_than_hidden_states_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forward(self: Any, input_ids: torch.Tensor, **_: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", forward)
    config = text_config("cohere2", tie_word_embeddings=False)
    decoder, plain = logits_of(config, whole(LlavaConfig, config))
    torch.testing.assert_close(decoder.compute_logits(HIDDEN), plain * 0.25)
    assert "Logits are made as Cohere2ForCausalLM makes them" in caplog.text


@pytest.mark.parametrize(
    ("of_text", "of_whole", "tied"),
    [(False, False, False), (True, False, True), (False, True, True), (True, True, True)],
)
def test_a_head_is_tied_if_either_config_ties_it(of_text: bool, of_whole: bool, tied: bool) -> None:
    config = text_config("gemma2", tie_word_embeddings=of_text)
    hf_config = whole(LlavaConfig, config, tie_word_embeddings=of_whole)
    decoder = TransformersDecoder(
        config, dataclasses.replace(make_context(config), hf_config=hf_config)
    )
    assert (decoder.lm_head is None) == tied


def test_names_with_a_star_in_them_are_kept_in_float32_too() -> None:
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(2))
            self.to(torch.bfloat16)

        def _get_dtype_plan(self, dtype: torch.dtype) -> dict[str, torch.dtype]:
            return {"layers.*.bias": torch.float32}

    model = Model()
    keep_float32(model)
    wide = [name for name, tensor in model.named_parameters() if tensor.dtype == torch.float32]
    assert wide == ["layers.0.bias", "layers.1.bias"]


@pytest.fixture
def bfloat16() -> Iterator[None]:
    """Modules and caches are made in bfloat16, as the loader does."""
    torch.set_default_dtype(torch.bfloat16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("bfloat16")
def test_linear_layers_are_packed_for_bfloat16_and_stay_near_float32() -> None:
    config, ids = text_config("qwen3"), some_ids()
    decoder = make_decoder(config)
    expected = transformers_logits(decoder, config, ids)
    pack_linears(decoder)
    linears = [module for module in decoder.modules() if isinstance(module, CalledLinear)]
    assert len(linears) == 2 * 7 + 1
    if ops.chosen("cpu").name == "cpp":
        assert all(linear.packed is not None for linear in linears)
    difference = (run_paged(decoder, ids, [25, 15]) - expected).pow(2).mean().sqrt()
    assert 0 < difference / expected.std() < 0.05


@pytest.mark.usefixtures("bfloat16")
def test_what_transformers_keeps_in_float32_is_kept() -> None:
    config = Dots1Config(
        **SIZES,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        moe_intermediate_size=32,
        first_k_dense_replace=0,
    )
    decoder = make_decoder(config)
    tensors = dict([*decoder.named_parameters(), *decoder.named_buffers()])
    wide = {name for name, tensor in tensors.items() if tensor.dtype == torch.float32}
    assert sum("e_score_correction_bias" in name for name in wide) == 2
    assert not any("proj" in name for name in wide)
    assert run_paged(decoder, some_ids(9), [9]).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("backbone", "changes", "native"),
    [
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("qwen3", {}, False),
        ("llama", {"hidden_act": "gelu"}, False),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, False),
    ],
)
def test_the_native_decoder_runs_what_it_covers(
    backbone: str, changes: dict[str, Any], native: bool
) -> None:
    config = text_config(backbone, **changes)
    decoder = build_decoder(config, make_context(config))
    assert isinstance(decoder, TransformersDecoder) != native


def test_dummy_weights_are_finite_and_equal_for_equal_seeds() -> None:
    first, second = (make_decoder(text_config("mixtral")) for _ in range(2))
    for decoder in (first, second):
        fill_random(decoder, seed=3)
    ids = some_ids(9)
    logits = run_paged(first, ids, [9])
    assert logits.isfinite().all()
    assert torch.equal(logits, run_paged(second, ids, [9]))


def test_a_checkpoint_of_a_tied_backbone_loads_without_a_head(tmp_path: Path) -> None:
    path = make_llava(tmp_path, backbone="cohere2")
    config = EngineConfig(model=str(path), progress=False)
    decoder = load_model(open_model(config), torch.device("cpu")).model.language_model
    assert isinstance(decoder, TransformersDecoder)
    assert decoder.lm_head is None


def test_biases_of_a_plain_config_are_loaded_by_their_names() -> None:
    config = LlamaConfig(**SIZES, attention_bias=True)
    names = weights_of(make_decoder(config))
    assert {"layers.1.self_attn.q_proj.bias", "lm_head.weight", "norm.weight"} <= set(names)
