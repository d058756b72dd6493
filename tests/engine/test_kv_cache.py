from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_engine.engine.kv_cache import KVCache
from mm_engine.request import Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import Sequence


def new_sequence() -> Sequence:
    return Sequence(Request("r", (1,) * 100, SamplingParams(max_tokens=1)))


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(1, 1), (4, 1), (5, 2), (8, 2), (9, 3)])
def test_blocks_cover_the_tokens_and_no_more(num_tokens: int, num_blocks: int) -> None:
    cache, sequence = KVCache(10, 4), new_sequence()
    cache.append(sequence, num_tokens)
    assert len(sequence.block_table) == num_blocks == cache.num_used_blocks


def test_a_block_is_filled_before_another_is_taken() -> None:
    cache, sequence = KVCache(2, 4), new_sequence()
    for position in range(8):
        cache.append(sequence, 1)
        assert len(sequence.block_table) == position // 4 + 1
        sequence.num_computed_tokens += 1
    assert not cache.append(sequence, 1)


def test_freed_blocks_can_be_had_again() -> None:
    cache, first, second = KVCache(3, 4), new_sequence(), new_sequence()
    cache.append(first, 12)
    assert not cache.append(second, 1)
    cache.free(first)
    assert first.block_table == []
    cache.append(second, 12)
    assert sorted(second.block_table) == [0, 1, 2]


def test_freeing_twice_or_what_is_not_owned_is_caught() -> None:
    cache, sequence = KVCache(3, 4), new_sequence()
    cache.append(sequence, 5)
    table = list(sequence.block_table)
    cache.free(sequence)
    cache.free(sequence)  # holds nothing: nothing happens
    assert cache.num_free_blocks == 3
    sequence.block_table = table
    with pytest.raises(AssertionError):
        cache.free(sequence)


@given(
    st.integers(1, 12),
    st.integers(1, 4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=60),
)
def test_no_block_is_shared_or_lost(
    num_blocks: int, block_size: int, acts: list[tuple[int, int]]
) -> None:
    cache = KVCache(num_blocks, block_size)
    sequences = [new_sequence() for _ in range(4)]
    for which, num_new_tokens in acts:
        sequence = sequences[which]
        if num_new_tokens == 0:
            cache.free(sequence)
            sequence.num_computed_tokens = 0
        elif cache.append(sequence, num_new_tokens):
            sequence.num_computed_tokens += num_new_tokens
        owned = [block for each in sequences for block in each.block_table]
        assert len(set(owned)) == len(owned) == cache.num_used_blocks
        assert len(owned) + cache.num_free_blocks == num_blocks
        for each in sequences:
            assert len(each.block_table) == cache.num_blocks_for(each.num_computed_tokens)
