"""One new token a sequence: the Triton kernel gives what the reference gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import reference

from paged import Paged

LENS = [1, 33, 17, 50]


def decodes(*lens: int, **options: Any) -> Paged:
    return Paged([(1, length) for length in lens], **options)


def assert_meets_reference(step: Paged, kernels: Any, *args: Any, **options: Any) -> None:
    got = step.decode(kernels, *args, **options)
    torch.testing.assert_close(got, step.decode(reference, *args), **step.tolerance)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("head_dim", [40, 60, 63, 64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int, num_splits: int, kernels: Any, device: str) -> None:
    step = decodes(33, head_dim=head_dim, heads=(2, 1), device=device)
    assert_meets_reference(step, kernels, num_splits=num_splits)


@pytest.mark.parametrize("heads", [(4, 4), (7, 1), (14, 2), (71, 1)], ids=str)
def test_heads(heads: tuple[int, int], kernels: Any, device: str) -> None:
    assert_meets_reference(decodes(*LENS[:2], heads=heads, device=device), kernels)


@pytest.mark.parametrize("table_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
def test_block_sizes(block_size: int, table_dtype: torch.dtype, kernels: Any, device: str) -> None:
    step = decodes(*LENS, block_size=block_size, table_dtype=table_dtype, device=device)
    assert_meets_reference(step, kernels, num_splits=2)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [1, 16, 20, 1000])
def test_windows_and_soft_caps(
    window: int, softcap: float | None, kernels: Any, device: str
) -> None:
    assert_meets_reference(decodes(*LENS, device=device), kernels, window, softcap, num_splits=2)


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["own", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(
    dtype: torch.dtype, cache_dtype: torch.dtype | None, kernels: Any, device: str
) -> None:
    step = decodes(*LENS, head_dim=64, dtype=dtype, cache_dtype=cache_dtype, device=device)
    assert_meets_reference(step, kernels, num_splits=2)


def test_fp8_is_read_from_its_bits_where_a_card_cannot_convert_it(
    kernels: Any, device: str
) -> None:
    step = decodes(*LENS, dtype=torch.bfloat16, cache_dtype=torch.float8_e4m3fn, device=device)
    expected = step.decode(reference)
    step.key_cache = step.key_cache.view(torch.uint8)
    step.value_cache = step.value_cache.view(torch.uint8)
    torch.testing.assert_close(step.decode(kernels), expected, **step.tolerance)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_padding_rows_are_zeros_and_harm_nobody(num_splits: int, kernels: Any, device: str) -> None:
    step = decodes(0, 20, 0, 5, device=device)
    got = step.decode(kernels, num_splits=num_splits)
    assert not got[[0, 2]].any()
    torch.testing.assert_close(got, step.decode(reference), **step.tolerance)


def test_scores_far_apart_do_not_overflow(kernels: Any, device: str) -> None:
    step = decodes(*LENS, device=device)
    step.query *= 300.0
    assert_meets_reference(step, kernels, num_splits=3)
    assert_meets_reference(step, kernels, None, 30.0)


def test_output_may_be_given(kernels: Any, device: str) -> None:
    step = decodes(*LENS, device=device)
    out = torch.full((4, 6, 24), 9.0, device=device)[:, 1:5]
    got = step.decode(kernels, out=out, num_splits=2)
    assert got.data_ptr() == out.data_ptr()
    torch.testing.assert_close(got, step.decode(reference), **step.tolerance)


def test_the_tiles_of_a_card_do_the_same(kernels: Any, device: str) -> None:
    from mm_engine_kernels.triton.paged_decode import decode_tiles

    for block_size in (16, 64):  # 64: a tile lies in one block
        step = decodes(150, 64, 3, block_size=block_size, head_dim=64, device=device)
        tiles = decode_tiles(64, 2, (9, 0))
        assert tiles.keys == 64
        assert_meets_reference(step, kernels, tiles=tiles, num_splits=2)


@settings(max_examples=10)
@given(data=st.data())
def test_any_lengths(data: st.DataObject, kernels: Any, device: str) -> None:
    lens = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3).filter(any))
    window = data.draw(st.none() | st.integers(1, 80))
    step = decodes(*lens, block_size=data.draw(st.sampled_from([1, 5, 16, 32])), device=device)
    assert_meets_reference(step, kernels, window, num_splits=data.draw(st.integers(1, 5)))


def test_splits_fill_the_card_and_keep_two_tiles_each() -> None:
    pytest.importorskip("triton", reason="triton isn't installed: pip install triton")
    from mm_engine_kernels.triton.paged_decode import choose_splits

    assert choose_splits(32, 4096, 64, 132) == 32  # one sequence of 32 heads
    assert choose_splits(256, 4096, 64, 132) == 4
    assert choose_splits(2048, 4096, 64, 132) == 1
    assert choose_splits(8, 300, 64, 132) == 2  # too short for more
    assert choose_splits(1, 1, 64, 132) == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs want a card")
def test_a_graph_replays_with_other_lengths(kernels: Any) -> None:
    step = decodes(*LENS, device="cuda")
    lens, query = step.context_lens, step.query

    def run() -> torch.Tensor:
        got: torch.Tensor = kernels.paged_decode(
            query, step.key_cache, step.value_cache, step.block_tables, lens, 0.2,
            max_context_len=64, num_splits=4,
        )  # fmt: skip
        return got

    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run()
    lens.copy_(torch.tensor([1, 3, 0, 49]))
    graph.replay()
    expected = reference.paged_decode(
        query, step.key_cache, step.value_cache, step.block_tables, lens, 0.2, max_context_len=64
    )
    torch.testing.assert_close(got, expected, **step.tolerance)
