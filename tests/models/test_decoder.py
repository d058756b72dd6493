"""The native decoder follows its config, and says which ones it can't follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mm_engine_kernels import ops
from transformers import GPT2Config, LlavaConfig, MistralConfig, Qwen2Config

from checkpoints import text_config, vision_config
from mm_engine.config import ModelContext
from mm_engine.errors import StartupError
from mm_engine.models import build_decoder
from mm_engine.models.decoder import Decoder, head_size, layer_window, native_features
from mm_engine.models.packed_weights import PackedEmbedding
from mm_engine.models.weights import load_into
from mm_engine.worker.loader import pack_heads
from mm_engine.worker.memory import size_of


def make_context(text: Any) -> ModelContext:
    config = LlavaConfig(
        text_config=text,
        vision_config=vision_config("clip"),
        tie_word_embeddings=text.tie_word_embeddings,
    )
    tokenizer: Any = None  # a decoder asks for none
    return ModelContext(config, Path(), tokenizer, torch.float32, 64, {"image": 1}, "Any")


def windows(config: Any) -> list[int | None]:
    return [layer_window(config, i) for i in range(config.num_hidden_layers)]


def test_mistral_slides_in_every_layer_unless_it_has_no_window() -> None:
    assert windows(MistralConfig(num_hidden_layers=2, sliding_window=24)) == [24, 24]
    assert windows(MistralConfig(num_hidden_layers=2, sliding_window=None)) == [None, None]


def test_qwen2_slides_only_where_its_config_says() -> None:
    mixed = Qwen2Config(
        num_hidden_layers=4, sliding_window=8, use_sliding_window=True, max_window_layers=2
    )
    assert windows(mixed) == [None, None, 8, 8]
    # Released configs have a window's size and don't use it.
    unused = Qwen2Config(num_hidden_layers=2, sliding_window=8, use_sliding_window=False)
    assert windows(unused) == [None, None]


def test_windows_reach_the_attention_layers() -> None:
    text = text_config("mistral", sliding_window=7)
    decoder = build_decoder(text, make_context(text))
    assert [layer.self_attn.attention.sliding_window for layer in decoder.layers] == [7, 7]


def test_a_window_in_the_config_of_a_backbone_without_one_is_ignored_as_in_transformers() -> None:
    text = text_config("llama")
    text.sliding_window = 7
    decoder = build_decoder(text, make_context(text))
    assert [layer.self_attn.attention.sliding_window for layer in decoder.layers] == [None, None]


@pytest.mark.parametrize(
    ("backbone", "changes", "qkv", "out"),
    [
        ("llama", {}, False, False),
        ("llama", {"attention_bias": True}, True, True),
        ("mistral", {}, False, False),
        ("qwen2", {}, True, False),
    ],
)
def test_biases_are_where_transformers_has_them(
    backbone: str, changes: dict[str, Any], qkv: bool, out: bool
) -> None:
    text = text_config(backbone, **changes)
    attention = build_decoder(text, make_context(text)).layers[0].self_attn
    assert (attention.qkv_proj.bias is not None) == qkv
    assert (attention.o_proj.bias is not None) == out


def test_head_size_follows_from_the_config() -> None:
    assert head_size(text_config("llama")) == 16
    assert head_size(text_config("mistral")) == 24


def test_an_activation_that_is_not_covered_is_refused_by_the_native_decoder() -> None:
    text = text_config("llama", hidden_act="gelu")
    assert native_features(text) is None
    with pytest.raises(StartupError, match="activation .* not supported: gelu"):
        Decoder(text, make_context(text), {})


def test_a_rope_that_is_not_covered_is_refused_by_the_native_decoder() -> None:
    text = text_config("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert native_features(text) is None
    with pytest.raises(StartupError, match="rope scaling .* not supported: dynamic"):
        Decoder(text, make_context(text), {})


def test_configs_of_other_types_are_not_taken_for_native_ones() -> None:
    assert native_features(text_config("llama")) == {}
    assert native_features(text_config("qwen2")) is not None
    assert native_features(text_config("qwen3")) is None
    assert native_features(GPT2Config()) is None


def test_choosing_the_slower_decoder_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    text = text_config("qwen3")
    with caplog.at_level("INFO", "mm_engine"):
        build_decoder(text, make_context(text))
    assert "Text backbone qwen3 runs through transformers' modules." in caplog.messages


@pytest.mark.skipif(ops.chosen("cpu").name != "cpp", reason="the C++ kernels aren't built")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab_size", [512, 509])
def test_a_tied_head_is_packed_once_and_looked_up_as_embeddings(
    vocab_size: int, dtype: torch.dtype
) -> None:
    text = text_config("llama", tie_word_embeddings=True, vocab_size=vocab_size)
    decoder = build_decoder(text, make_context(text))
    assert isinstance(decoder, Decoder) and decoder.lm_head is None
    decoder.embedding.weight.data.normal_(generator=torch.Generator().manual_seed(0))
    decoder.to(dtype)
    weight = decoder.embedding.weight.detach().clone()
    place, num_bytes = decoder.embedding.weight.data_ptr(), size_of(decoder)
    decoder.pack_head()
    packed = decoder.embedding.packed
    assert (packed.data.data_ptr() == place) == (vocab_size % 16 == 0)  # nothing is filled up
    assert size_of(decoder) - num_bytes <= 15 * weight[0].nbytes
    ids = torch.tensor([[3, vocab_size - 1, 0], [7, 7, 1]])
    assert torch.equal(decoder.embed_tokens(ids), weight[ids])
    hidden = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1)).to(dtype)
    got, wanted = decoder.compute_logits(hidden), hidden.double() @ weight.double().T
    assert got.dtype == dtype
    step = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(got.double(), wanted, rtol=step, atol=10 * step)
    with pytest.raises(IndexError):
        decoder.embed_tokens(torch.tensor([vocab_size]))
    load_into(decoder, {"embed_tokens.weight": weight + 1}.items(), {})
    assert torch.equal(decoder.embed_tokens(ids), (weight + 1)[ids])


@pytest.mark.skipif(ops.chosen("cpu").name != "cpp", reason="the C++ kernels aren't built")
def test_embeddings_that_somebody_else_reads_stay_as_they_are() -> None:
    text = text_config("llama", tie_word_embeddings=True)
    decoder = build_decoder(text, make_context(text))
    assert isinstance(decoder, Decoder)
    decoder.embedding.weight.data.normal_()
    other = torch.nn.Linear(*decoder.embedding.weight.shape[::-1], bias=False)
    other.weight = decoder.embedding.weight
    before = other.weight.detach().clone()
    pack_heads(torch.nn.ModuleList([decoder, other]))
    assert type(decoder.embedding) is torch.nn.Embedding
    assert torch.equal(other.weight, before)
    pack_heads(decoder)
    assert type(decoder.embedding) is PackedEmbedding
