"""The table of rotary positions is transformers' for every scaling that it covers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, MistralConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mm_engine.errors import StartupError
from mm_engine.models.decoder import head_size
from mm_engine.models.layers import RotaryTable

MAX_LEN = 160
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10000.0},
    "far-base": {"rope_type": "default", "rope_theta": 1e6},
    "linear": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 40,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 40,
    },
}


def make_config(scaling: dict[str, Any]) -> Any:
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=MAX_LEN,
        rope_parameters=scaling,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", SCALINGS)
def test_the_table_is_transformers(name: str, dtype: torch.dtype) -> None:
    config = make_config(SCALINGS[name])
    positions = torch.tensor([0, 1, 2, 39, 40, 41, 3, MAX_LEN - 1])
    expected = LlamaRotaryEmbedding(config)(torch.empty(0, dtype=dtype), positions[None])
    got = RotaryTable(config, head_size(config), MAX_LEN)(positions, dtype)
    for table, wanted in zip(got, expected, strict=True):
        assert table.dtype == dtype
        assert torch.equal(table, wanted[0])


def test_scalings_differ_from_the_default() -> None:
    """So that the comparison above could fail."""
    tables = [RotaryTable(make_config(s), 16, MAX_LEN).cos for s in SCALINGS.values()]
    for i, table in enumerate(tables):
        assert not any(torch.equal(table, other) for other in tables[:i])


def test_an_explicit_head_size_is_used() -> None:
    config: Any = MistralConfig(hidden_size=64, num_attention_heads=4, head_dim=24)
    cos, _ = RotaryTable(config, head_size(config), 8)(torch.arange(8), torch.float32)
    expected = LlamaRotaryEmbedding(config)(torch.empty(0), torch.arange(8)[None])[0]
    assert torch.equal(cos, expected[0])


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_scaling_that_depends_on_the_prompt_is_refused(kind: str) -> None:
    config = make_config({"rope_type": "default", "rope_theta": 10000.0})
    config.rope_parameters = {"rope_type": kind, "rope_theta": 10000.0, "factor": 2.0}
    with pytest.raises(StartupError, match=f"not supported: {kind}. Supported: default, linear"):
        RotaryTable(config, 16, MAX_LEN)


def test_the_table_is_in_no_checkpoint() -> None:
    assert not RotaryTable(make_config(SCALINGS["default"]), 16, 8).state_dict()
