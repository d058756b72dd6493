"""Options that no engine could run with are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import pytest

from mm_engine import LLM
from mm_engine.config import ATTENTION_BACKENDS, EngineConfig, backend_name
from mm_engine.errors import StartupError


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 0},
        {"max_num_seqs": -1},
        {"max_num_seqs": 1.5},
        {"max_num_seqs": True},
        {"max_num_batched_tokens": 0},
        {"max_num_batched_tokens": None},
        {"block_size": 0},
        {"block_size": "16"},
        {"num_speculative_tokens": -1},
        {"num_speculative_tokens": 2.0},
        {"num_speculative_tokens": True},
        {"async_scheduling": 1},
        {"async_scheduling": "on"},
        {"enforce_eager": 1},
        {"prompt_lookup_max": 0},
        {"prompt_lookup_max": 33},
        {"prompt_lookup_max": None},
        {"prompt_lookup_min": 0},
        {"prompt_lookup_min": 5},
        {"kv_cache_memory": 0},
        {"kv_cache_memory": -5},
        {"max_decode_slowdown": 1},
        {"max_decode_slowdown": 0.5},
        {"max_decode_slowdown": float("nan")},
        {"max_decode_slowdown": "2"},
        {"output_interval": -0.1},
        {"output_interval": 1.1},
        {"output_interval": float("nan")},
        {"output_interval": None},
        {"memory_utilization": 0},
        {"memory_utilization": 1.01},
        {"memory_utilization": float("nan")},
        {"memory_utilization": "half"},
        {"limit_mm_per_prompt": {"image": -1}},
        {"limit_mm_per_prompt": {"image": 1.5}},
    ],
    ids=str,
)
def test_an_option_out_of_range_is_named(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    shown = value["image"] if isinstance(value, dict) else value
    with pytest.raises(StartupError, match=f"^{name}.* is out of range: {shown!r}. Give "):
        EngineConfig(model="m", **options)


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_seqs": 1, "max_num_batched_tokens": 1, "block_size": 1},
        {"num_speculative_tokens": 1, "prompt_lookup_max": 1, "prompt_lookup_min": 1},
        {"num_speculative_tokens": 1, "async_scheduling": False},
        {"async_scheduling": True},
        {"enforce_eager": True},
        {"prompt_lookup_max": 32, "prompt_lookup_min": 32},
        {"kv_cache_memory": 1},
        {"max_decode_slowdown": 1.01},
        {"max_decode_slowdown": float("inf")},
        {"output_interval": 0},
        {"output_interval": 1},
        {"memory_utilization": 1},
        {"limit_mm_per_prompt": {"image": 0}},
        {"limit_mm_per_prompt": {}},
    ],
    ids=str,
)
def test_options_at_the_edge_are_taken(options: dict[str, Any]) -> None:
    config = EngineConfig(model="m", **options)
    assert all(getattr(config, name) == value for name, value in options.items())


@pytest.mark.parametrize(
    "options",
    [{"prompt_lookup_max": 3}, {"prompt_lookup_min": 1}, {"num_speculative_tokens": 5}],
    ids=str,
)
def test_speculation_is_said_in_one_place(options: dict[str, Any]) -> None:
    """Neither way wins silently over the other."""
    config = {"method": "ngram", "num_speculative_tokens": 5}
    with pytest.raises(StartupError, match=f"speculative_config and {next(iter(options))}. Put"):
        LLM("nothing is loaded", speculative_config=config, **options)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *((name, name) for name in ATTENTION_BACKENDS),
        ("FLASH_ATTN", "flash-attn"),  # as vLLM writes them
        ("TRITON_ATTN", "triton"),
        ("CPU_ATTN", "cpu"),
        ("TORCH_SDPA", "torch"),
        ("Torch", "torch"),
    ],
)
def test_an_attention_backend_may_be_written_as_in_vllm(text: str, name: str) -> None:
    assert backend_name(text) == name
    assert EngineConfig(model="m", attention_backend=text).attention_backend == text


@pytest.mark.parametrize("text", ["", "magic", "flash", "auto ", None])
def test_another_attention_backend_is_refused_before_anything_is_loaded(text: Any) -> None:
    with pytest.raises(StartupError, match=f"^attention backend is not known: {text}. Use auto, "):
        EngineConfig(model="m", attention_backend=text)


def test_guesses_and_steps_that_overlap_are_refused_together() -> None:
    with pytest.raises(StartupError, match="don't go together: .* Leave one of them out."):
        EngineConfig(model="m", num_speculative_tokens=3, async_scheduling=True)
