"""The native decoder follows its config, and says which ones it can't follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, LlavaConfig, MistralConfig, Qwen2Config

from checkpoints import text_config, vision_config
from mm_engine.config import ModelContext
from mm_engine.errors import StartupError
from mm_engine.models import build_decoder
from mm_engine.models.decoder import Decoder, head_size, layer_window, native_features


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
