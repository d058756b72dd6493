"""Backbones that would be computed wrong are refused, with the reason, before they serve."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BertConfig,
    BloomConfig,
    CLIPTextConfig,
    DogeConfig,
    FalconConfig,
    FalconH1Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GPTJConfig,
    GPTNeoConfig,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    MambaConfig,
    OpenAIGPTConfig,
    OPTConfig,
    Phi3Config,
    Qwen3ForCausalLM,
    Qwen3NextConfig,
)
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from backbones import FULL, SLIDING
from checkpoints import make_llava, text_config
from decoding import layers_of, make_context, make_decoder, run_paged, transformers_logits
from mm_engine import LLM
from mm_engine.errors import StartupError
from mm_engine.models import TransformersDecoder, build_decoder, transformers_decoder
from mm_engine.models.transformers_checks import differs

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
NO_GQA = {name: size for name, size in SIZES.items() if name != "num_key_value_heads"}


def longrope(limit: int) -> Phi3Config:
    """Other frequencies beyond `limit` tokens."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
    rope_parameters = {**rope, "rope_theta": 1e4, "original_max_position_embeddings": limit}
    return Phi3Config(
        **SIZES,
        pad_token_id=0,
        original_max_position_embeddings=limit,
        rope_parameters=rope_parameters,
    )


REFUSED: dict[str, tuple[Any, str]] = {
    "no-causal-model": (CLIPTextConfig(), "no causal language model"),
    "recurrent": (MambaConfig(), "layers other than attention"),
    "convolutions": (
        Lfm2Config(**SIZES, layer_types=["conv", FULL]),
        "layers other than attention: conv",
    ),
    "linear-attention": (
        Qwen3NextConfig(**SIZES, layer_types=["linear_attention", FULL]),
        "layers other than attention: linear_attention",
    ),
    "recurrence-beside-attention": (FalconH1Config(**SIZES), "layers other than attention"),
    "encoder": (BartConfig(), "crosses to an encoder"),
    "both-directions": (BertConfig(**NO_GQA), "neither causal nor a window"),
    "chunks": (
        Llama4TextConfig(
            **SIZES, head_dim=16, attention_chunk_size=8, num_local_experts=2, pad_token_id=0
        ),
        "neither causal nor a window",
    ),
    "sinks": (GptOssConfig(**SIZES, head_dim=16, num_local_experts=2), "attention with s_aux"),
    "position-biases": (
        BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
        "attention doesn't go through transformers' AttentionInterface",
    ),
    "attention-of-its-own": (
        OpenAIGPTConfig(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4),
        "(its attention doesn't go through transformers' AttentionInterface)",
    ),
    **{
        f"attention-of-its-own-{config.model_type}": (
            config,
            "(its attention doesn't go through transformers' AttentionInterface)",
        )
        for config in (
            FalconConfig(**NO_GQA),
            GPTJConfig(vocab_size=128, n_positions=64, n_embd=64, n_layer=2, n_head=4),
            GPTNeoConfig(
                vocab_size=128,
                max_position_embeddings=64,
                hidden_size=64,
                num_layers=2,
                num_heads=4,
                attention_types=[[["global"], 2]],
            ),
        )
    },
    "mask-of-its-own": (
        DogeConfig(**SIZES),
        "(an attention mask or bias of the model's own making)",
    ),
    "head-on-something-else": (
        OPTConfig(**NO_GQA, ffn_dim=96, word_embed_proj_dim=64),
        "head doesn't run on its backbone's output",
    ),
    "rope-by-length": (longrope(32), "longrope, which depend on a prompt's length beyond 32"),
}


@pytest.mark.parametrize(("config", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_served_is_refused_when_it_is_built(config: Any, reason: str) -> None:
    start = "" if reason.startswith("(") else r"\(.*"
    message = f"text backbone can't be served: {config.model_type} {start}{re.escape(reason)}"
    with pytest.raises(StartupError, match=message):
        build_decoder(config, make_context(config))


def test_rope_by_length_is_served_up_to_that_length() -> None:
    config, ids = longrope(32), torch.arange(30)
    with pytest.raises(StartupError, match="Give a max_model_len of at most 32"):
        TransformersDecoder(config, make_context(config, max_model_len=33))
    decoder = make_decoder(config, max_model_len=32)
    expected = transformers_logits(decoder, config, ids)
    torch.testing.assert_close(run_paged(decoder, ids, [17, 13]), expected, rtol=1e-4, atol=1e-4)


def test_dynamic_rope_is_served_up_to_the_length_that_it_leaves_alone() -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    config, ids = text_config("llama", **{**SIZES, "rope_parameters": rope}), torch.arange(40)
    with pytest.raises(StartupError, match="Give a max_model_len of at most 64"):
        TransformersDecoder(config, make_context(config, max_model_len=65))
    decoder = make_decoder(config, max_model_len=64)
    expected = transformers_logits(decoder, config, ids)
    torch.testing.assert_close(run_paged(decoder, ids, [17, 23]), expected, rtol=1e-4, atol=1e-4)


def per_layer_embeddings(config_class: type[Any]) -> Any:
    """A backbone that looks token ids up again in every layer."""
    return config_class(
        **SIZES,
        head_dim=16,
        layer_types=[SLIDING, FULL],
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=128,
    )


def test_a_backbone_that_needs_token_ids_in_every_layer_is_refused_when_it_runs() -> None:
    config = per_layer_embeddings(Gemma3nTextConfig)
    config.num_kv_shared_layers, config.activation_sparsity_pattern = 0, [0.0, 0.0]
    decoder = make_decoder(config)
    assert len(layers_of(decoder)) == 2
    with pytest.raises(StartupError, match="gemma3n_text .* more than the tokens' embeddings"):
        run_paged(decoder, torch.arange(5), [5])


def test_a_backbone_that_cannot_take_an_images_rows_is_refused_when_it_runs() -> None:
    decoder = make_decoder(per_layer_embeddings(Gemma4TextConfig))
    with pytest.raises(StartupError, match="gemma4_text .*its code raised RuntimeError"):
        run_paged(decoder, torch.arange(5), [5])


def mix_neighbours(decoder: TransformersDecoder) -> None:
    """Let each token take something from the one before it, as a convolution does."""
    norm = decoder.backbone.norm
    forward = norm.forward
    norm.forward = lambda x: forward(x + 0.2 * x.roll(1, dims=1))


def heed_the_furthest_position(decoder: TransformersDecoder) -> None:
    """Turn faster when any position is large, as rope by length does."""
    rotary = decoder.backbone.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, places: forward(x, places * (2 if places.max() > 30 else 1))


def mix_neighbours_keys(decoder: TransformersDecoder) -> None:
    """Let only a layer's keys take something from the token before."""
    proj = decoder.backbone.layers[1].self_attn.k_proj
    forward = proj.forward
    proj.forward = lambda x: forward(x + 0.2 * x.roll(1, dims=1))


@pytest.mark.parametrize(
    "defect", [mix_neighbours, mix_neighbours_keys, heed_the_furthest_position]
)
def test_tokens_that_depend_on_others_are_noticed_when_it_runs(defect: Any) -> None:
    decoder = make_decoder(text_config("qwen3"))
    defect(decoder)
    with pytest.raises(StartupError, match="depend on others in another way than attention"):
        run_paged(decoder, torch.arange(5), [5])


def test_broken_weights_are_left_to_the_worker_to_report() -> None:
    decoder = make_decoder(text_config("qwen3"))
    decoder.backbone.norm.weight.data.fill_(float("nan"))
    assert run_paged(decoder, torch.arange(5), [5]).isnan().all()


def nan_when_far(decoder: TransformersDecoder) -> None:
    """Give NaN for positions that no short sequence reaches."""
    rotary = decoder.backbone.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, places: tuple(
        part * (float("nan") if places.max() > 30 else 1) for part in forward(x, places)
    )


def test_nan_at_far_positions_only_is_noticed_when_it_runs() -> None:
    decoder = make_decoder(text_config("qwen3"))
    nan_when_far(decoder)
    with pytest.raises(StartupError, match="depend on others in another way than attention"):
        run_paged(decoder, torch.arange(5), [5])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_differs_is_told_from_rounding(dtype: torch.dtype) -> None:
    rows = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = torch.randn(4, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    small, large = (1e-4, 1e-2) if dtype == torch.float32 else (1e-2, 0.2)
    for scale in (1e-3, 1.0, 1e3):
        assert not differs(rows * scale, (rows + small * noise) * scale)
        assert differs(rows * scale, (rows + large * noise) * scale)
        assert differs(rows * scale, torch.full_like(rows, float("nan")))
    assert not differs(torch.full_like(rows, float("nan")), rows)  # for the worker to say
    assert not differs(torch.full_like(rows, float("inf")), rows)


def test_tokens_that_depend_on_others_are_noticed_in_bfloat16() -> None:
    decoder = make_decoder(text_config("qwen3")).to(torch.bfloat16)
    mix_neighbours(decoder)
    with pytest.raises(StartupError, match="depend on others in another way than attention"):
        run_paged(decoder, torch.arange(5), [5])


def test_behaviour_is_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(transformers_decoder, "check_behaviour", lambda *args: calls.append(args))
    decoder = make_decoder(text_config("qwen3"))
    run_paged(decoder, torch.arange(5), [2, 1, 2])
    assert len(calls) == 1


def test_a_refused_model_is_checked_again() -> None:
    decoder = make_decoder(text_config("qwen3"))
    mix_neighbours(decoder)
    for _ in range(2):
        with pytest.raises(StartupError, match="depend on others"):
            run_paged(decoder, torch.arange(5), [5])


def test_embeddings_that_a_model_writes_to_are_not_taken_for_a_difference() -> None:
    config, ids = text_config("qwen3"), torch.arange(9)
    decoder = make_decoder(config)
    expected = transformers_logits(decoder, config, ids)
    forward = decoder._run

    def overwrite(embeddings: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden = forward(embeddings, positions)
        embeddings.fill_(7.0)
        return hidden

    decoder._run = overwrite  # type: ignore[method-assign]
    torch.testing.assert_close(run_paged(decoder, ids, [9]), expected, rtol=1e-4, atol=1e-4)


def test_a_config_that_says_it_is_not_causal_is_refused() -> None:
    config = text_config("qwen3")
    config.is_causal = False
    with pytest.raises(StartupError, match=r"qwen3 \(attention that isn't causal"):
        build_decoder(config, make_context(config))


def test_a_stateful_model_is_refused_whatever_its_layers_are_called(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Qwen3ForCausalLM, "_is_stateful", True)
    config = text_config("qwen3")
    with pytest.raises(StartupError, match="layers other than attention: recurrent"):
        build_decoder(config, make_context(config))


def test_rope_by_length_is_found_in_one_kind_of_layers() -> None:
    config = text_config("gemma3")
    assert set(config.rope_parameters) == {SLIDING, FULL}
    config.rope_parameters[FULL] = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    config.max_position_embeddings = 32
    with pytest.raises(StartupError, match="gemma3_text .*dynamic, which depend .* beyond 32"):
        TransformersDecoder(config, make_context(config, max_model_len=33))


def test_layers_that_do_not_attend_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Qwen3DecoderLayer,
        "forward",
        lambda self, hidden, **kw: (
            hidden if self.self_attn.layer_idx else hidden + self.self_attn(hidden, **kw)[0]
        ),
    )
    config = text_config("qwen3")
    with pytest.raises(StartupError, match="1 of 2 layers: its attention doesn't go through"):
        build_decoder(config, make_context(config))


def test_startup_ends_with_the_backbones_name_not_the_plugins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_llava(tmp_path, backbone="qwen3")

    def defective(config: Any, ctx: Any) -> TransformersDecoder:
        decoder = TransformersDecoder(config, ctx)
        mix_neighbours(decoder)
        return decoder

    monkeypatch.setattr("mm_llava.model.build_decoder", defective)
    with pytest.raises(StartupError, match="text backbone can't be served: qwen3") as caught:
        LLM(str(path), dtype="float32", progress=False)
    assert "mm-llava" not in str(caught.value)
