"""The norms in C++ against the same in float64, and against how the reference rounds."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import reference
from mm_engine_kernels.cpu.rms_norm import add_rms_norm, rms_norm
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
# Of the result: in bfloat16 the norm is rounded, and its product with the weight.
ERROR = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}


def assert_norm(got: Tensor, x: Tensor, weight: Tensor, eps: float = 1e-5) -> None:
    wide = x.double()
    exact = wide / (wide.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    torch.testing.assert_close(got.double(), exact, rtol=ERROR[x.dtype], atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25)
@given(
    num=st.integers(0, 9) | st.sampled_from([70, 257]),
    size=st.integers(1, 100) | st.sampled_from([896, 1000, 4097]),
    scale=st.sampled_from([1e-3, 1.0, 300.0]),
    seed=st.integers(0, 1000),
)
def test_norms(
    isa: str, threads: int, dtype: torch.dtype, num: int, size: int, scale: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x, residual = ((torch.randn(num, size, generator=random) * scale).to(dtype) for _ in range(2))
    weight = torch.randn(size, generator=random).to(dtype)
    assert_norm(rms_norm(x, weight, 1e-5), x, weight)
    before = x.clone(), residual.clone()
    normed, total = add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(total, residual + x)
    assert_norm(normed, total, weight)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])


def test_bfloat16_is_rounded_where_the_reference_rounds(isa: str) -> None:
    x, weight = torch.randn(64, 300).bfloat16(), torch.randn(300).bfloat16()
    expected = reference.rms_norm(x, weight, 1e-5)
    # But where the float32 norm, summed in another order, falls on the other side of a tie.
    assert (rms_norm(x, weight, 1e-5) != expected).float().mean() < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart_or_unaligned(isa: str, dtype: torch.dtype) -> None:
    wide = torch.randn(3, 5, 91).to(dtype)
    weight = torch.randn(41).to(dtype)[1:]
    for x, residual in (
        (wide[:, 1:3, 3:43], wide[:, 3:, 41:81]),
        (wide[0, :, 1:41], wide[1, :, 2:42]),  # one stride for all rows
        (wide[:, 0, 1:81:2], wide[:, 1, 11::2]),  # columns apart
        (wide[0, 0, :40], wide[0, 1, :40]),  # one row
    ):
        assert_norm(rms_norm(x, weight, 1e-5), x, weight)
        normed, total = add_rms_norm(x, residual, weight, 1e-5)
        assert torch.equal(total, residual + x)
        assert_norm(normed, total, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_in_their_rows(isa: str, dtype: torch.dtype) -> None:
    x = torch.ones(4, 37, dtype=dtype)
    x[1, 36] = float("nan")
    x[2, 0] = -float("inf")
    weight = torch.ones(37, dtype=dtype)
    for got in (rms_norm(x, weight, 0.0), add_rms_norm(x, x.new_zeros(4, 37), weight, 0.0)[0]):
        expected = reference.rms_norm(x, weight, 0.0)
        torch.testing.assert_close(got, expected, equal_nan=True)
    assert bool((rms_norm(x[:1] * 0, weight, 1e-5) == 0).all())


def test_what_the_kernels_do_not_take_is_the_reference_s(isa: str) -> None:
    x = torch.randn(3, 16)
    wide = torch.randn(16)
    half = rms_norm(x.half(), wide.half(), 1e-5)
    assert torch.equal(half, reference.rms_norm(x.half(), wide.half(), 1e-5))
    # A weight of another dtype decides the result's.
    mixed = rms_norm(x.bfloat16(), wide, 1e-5)
    assert torch.equal(mixed, reference.rms_norm(x.bfloat16(), wide, 1e-5))
    with pytest.raises(RuntimeError):
        rms_norm(x, wide[:5], 1e-5)
