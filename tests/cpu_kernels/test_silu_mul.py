"""The gate in C++ against the same in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import reference
from mm_engine_kernels.cpu.silu_mul import silu_mul
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
# Of the result: in bfloat16 the gate is rounded, and its product.
ERROR = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7}


def check(x: Tensor) -> None:
    before = x.clone()
    got = silu_mul(x)
    assert torch.equal(x, before)
    gate, up = x.double().chunk(2, dim=-1)
    exact = gate / (1 + (-gate).exp()) * up
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    # float32 has no e^x beyond 88.7: a gate below -88.7 is 0, not some 1e-37.
    torch.testing.assert_close(got.double(), exact, rtol=ERROR[x.dtype], atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25)
@given(
    num=st.integers(0, 9) | st.sampled_from([70, 257]),
    size=st.integers(1, 100) | st.sampled_from([1000, 2049]),
    scale=st.sampled_from([1e-3, 3.0, 50.0]),
    seed=st.integers(0, 1000),
)
def test_silu_mul(
    isa: str, threads: int, dtype: torch.dtype, num: int, size: int, scale: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    check((torch.randn(num, 2 * size, generator=random) * scale).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_size_of_gate(isa: str, dtype: torch.dtype) -> None:
    gate = torch.linspace(-120, 120, 4001)
    check(torch.stack((gate, torch.ones(4001)), -1).to(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart_or_unaligned(isa: str, dtype: torch.dtype) -> None:
    wide = torch.randn(3, 5, 91).to(dtype)
    check(wide[:, 1:3, 3:43])
    check(wide[0, :, 1:79])
    check(wide[:, 0, 1::3])
    check(wide[0, 0, :40])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_come_out_as_the_reference_s(isa: str, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    gate = torch.tensor([nan, 1.0, inf, -inf, inf, 2.0, -200.0, 0.0] * 5, dtype=dtype)
    up = torch.tensor([1.0, nan, 1.0, 1.0, 0.0, inf, 1.0, inf] * 5, dtype=dtype)
    x = torch.cat((gate, up))[None]
    torch.testing.assert_close(silu_mul(x), reference.silu_mul(x), equal_nan=True)


def test_float16_is_the_reference_s() -> None:
    x = torch.randn(3, 16).half()
    assert torch.equal(silu_mul(x), reference.silu_mul(x))
