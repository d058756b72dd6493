"""The largest of a row in C++ against PyTorch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels.cpu.largest import amax, argmax
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def check(x: Tensor) -> None:
    before = x.clone()
    places, values = argmax(x), amax(x)
    assert torch.equal(x.view(torch.uint8), before.view(torch.uint8))
    expected = x.double().max(-1).values
    torch.testing.assert_close(values.double(), expected, rtol=0, atol=0, equal_nan=True)
    assert places.dtype == torch.int64
    for row, place in zip(x, places.tolist(), strict=True):
        whole = row.isnan().logical_not()
        if bool(whole.all()):
            # The first of equals; PyTorch promises none.
            assert place == row.eq(row.max()).nonzero()[0].item()
        else:
            assert 0 <= place < len(row)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40)
@given(
    num=st.integers(0, 9) | st.sampled_from([70, 257]),
    size=st.integers(1, 200) | st.sampled_from([1000, 32064]),
    kinds=st.sampled_from([3, 1000, 10**7]),
    seed=st.integers(0, 1000),
)
def test_largest(
    isa: str, threads: int, dtype: torch.dtype, num: int, size: int, kinds: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    check(torch.randint(-kinds, kinds, (num, size), generator=random).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 131])
def test_every_place(isa: str, dtype: torch.dtype, size: int) -> None:
    check(torch.eye(size).to(dtype))
    check(-torch.eye(size).to(dtype))
    check(torch.full((3, size), float("-inf"), dtype=dtype))
    check(torch.where(torch.eye(size) > 0, float("inf"), 0.0).to(dtype))
    check(torch.where(torch.eye(size) > 0, float("-inf"), -1e30).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 7, 64, 131])
def test_nan_is_told_wherever_it_is(isa: str, dtype: torch.dtype, size: int) -> None:
    for rest in (0.0, float("inf"), float("-inf"), 5.0):
        check(torch.where(torch.eye(size) > 0, float("nan"), rest).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart_or_unaligned(isa: str, dtype: torch.dtype) -> None:
    wide = torch.randn(5, 391).to(dtype)
    for x in (wide[:, 3:], wide[1:4, 1:100], wide[:, ::3], wide.t()):
        places = argmax(x)
        torch.testing.assert_close(amax(x), x.float().amax(-1), rtol=0, atol=0)
        assert torch.equal(x.gather(1, places[:, None])[:, 0], x.amax(-1))


def test_what_the_kernel_does_not_take_is_the_references() -> None:
    x = torch.randn(3, 50)
    assert torch.equal(argmax(x.double()), x.argmax(-1))
    assert torch.equal(amax(x.half()), x.half().amax(-1))
    with pytest.raises(IndexError):
        argmax(torch.empty(2, 0))
