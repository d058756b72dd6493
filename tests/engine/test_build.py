from __future__ import annotations

from typing import Any

import pytest

from mm_engine.config import EngineConfig
from mm_engine.engine.build import num_cache_blocks, num_encoder_rows
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


def encoder_rows(max_item_rows: int, **options: Any) -> int:
    config = EngineConfig(model="none", max_num_batched_tokens=100, **options)
    return num_encoder_rows(config, max_item_rows, bytes_per_row=2**10)


def test_encoder_cache_holds_what_a_step_and_an_image_need_at_least() -> None:
    assert encoder_rows(10) == 2**17  # 128 MiB
    assert encoder_rows(2**18) == 2**18
    assert encoder_rows(10, encoder_cache_memory=20_000) == 19


def test_encoder_cache_below_an_image_is_refused() -> None:
    assert encoder_rows(9, encoder_cache_memory=9 * 2**10) == 9
    with pytest.raises(StartupError) as error:
        encoder_rows(10, encoder_cache_memory=9 * 2**10)
    assert str(error.value) == (
        "encoder_cache_memory is too small: 9216 bytes. One image takes up to 10 tokens of 1024 "
        "bytes: give at least 10240."
    )
