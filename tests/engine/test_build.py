from __future__ import annotations

from typing import Any

import pytest

from mm_engine.config import EngineConfig
from mm_engine.engine.build import num_cache_blocks
from mm_engine.errors import StartupError


def blocks(available: int = 10**6, *, is_cpu: bool = True, **options: Any) -> int:
    config = EngineConfig(model="none", block_size=16, max_num_seqs=4, **options)
    return num_cache_blocks(
        config, max_model_len=100, bytes_per_block=1000, available=available, is_cpu=is_cpu
    )


def test_on_a_gpu_the_cache_takes_all_that_is_left() -> None:
    assert blocks(999_999, is_cpu=False) == 999


def test_on_a_cpu_it_takes_what_full_sequences_can_use() -> None:
    assert blocks() == 4 * 7  # 100 tokens are 7 blocks


def test_on_a_cpu_it_takes_less_if_there_is_less() -> None:
    assert blocks(5_999) == 5


@pytest.mark.parametrize("is_cpu", [True, False])
def test_kv_cache_memory_is_taken_at_its_word(is_cpu: bool) -> None:
    assert blocks(10, is_cpu=is_cpu, kv_cache_memory=100_500) == 100


@pytest.mark.parametrize("available", [999, 0, -5])
def test_without_memory_for_a_block_it_does_not_start(available: int) -> None:
    with pytest.raises(StartupError, match=f"{max(0, available)} bytes of the 1000"):
        blocks(available)


def test_a_kv_cache_memory_below_a_block_is_refused() -> None:
    with pytest.raises(StartupError, match="kv_cache_memory is too small: 999 bytes"):
        blocks(kv_cache_memory=999)
