"""Keys and values in their slots, bit for bit as the reference stores them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import reference
from mm_engine_kernels.cpu.write_kv import write_kv
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def check(key: Tensor, value: Tensor, dtype: torch.dtype, slots: Tensor, size: int) -> None:
    num_blocks = max(slots.tolist(), default=0) // size + 2
    shape = (num_blocks, size, *key.shape[1:])
    expected = torch.full((2, *shape), 7.0).to(dtype)
    # Keys and values of a block may lie side by side.
    beside = torch.full((num_blocks, 2, *shape[1:]), 7.0).to(dtype)
    alone = expected.clone()
    reference.write_kv(key, value, expected[0], expected[1], slots)
    write_kv(key, value, beside[:, 0], beside[:, 1], slots)
    write_kv(key, value, alone[0], alone[1], slots)
    for got in (beside.transpose(0, 1), alone):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("cache_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(
    num=st.integers(0, 9) | st.sampled_from([300]),
    heads=st.integers(1, 3),
    dim=st.integers(1, 40) | st.sampled_from([64, 80, 128, 256]),
    size=st.sampled_from([1, 3, 16]),
    padding=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_slices_of_a_fused_projection(
    isa: str,
    threads: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    num: int,
    heads: int,
    dim: int,
    size: int,
    padding: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    fused = torch.randn(num, 4 * heads, dim, generator=random).to(dtype)
    slots = torch.randperm(2 * num, generator=random)[:num] * 5
    if padding:
        slots[1::3] = -1
    check(fused[:, 2 * heads : 3 * heads], fused[:, 3 * heads :], cache_dtype, slots, size)


@pytest.mark.parametrize("cache_dtype", [*DTYPES, torch.float16, torch.float8_e4m3fn], ids=str)
def test_any_cache_and_any_layout(isa: str, cache_dtype: torch.dtype) -> None:
    rows = torch.randn(3, 7, 2, 8)
    rows[0, 0, 0, 3], rows[1, 1, 1, 4] = float("nan"), float("inf")
    slots = torch.tensor([5, -1, 0, 1, 9, -1, 30, 4])
    key, value = rows[0].transpose(1, 2).contiguous().transpose(1, 2), rows[1]
    shape = (2, 8, 4, 2, 8)
    expected, got = (torch.zeros(shape).to(cache_dtype) for _ in range(2))
    reference.write_kv(key, value, expected[0], expected[1], slots[:7])
    write_kv(key, value, got[0], got[1], slots[:7])
    torch.testing.assert_close(got.float(), expected.float(), equal_nan=True)
    every_other = slots.repeat_interleave(2)[:14:2]
    write_kv(key, value, got[0], got[1], every_other)
    torch.testing.assert_close(got.float(), expected.float(), equal_nan=True)


def test_a_slot_that_is_not_there_is_refused() -> None:
    rows, caches = torch.ones(2, 3, 2, 8), torch.zeros(2, 4, 16, 2, 8)
    for slot in (64, 1 << 60):
        with pytest.raises(IndexError, match=r"from -1 to 63, not -?\d+"):
            write_kv(rows[0], rows[1], caches[0], caches[1], torch.tensor([0, slot, 1]))
    assert not caches.any()
