"""Rotary positions in C++ against the same in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import reference
from mm_engine_kernels.cpu.rotary import rotary
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
# Of each product that is added: in bfloat16 both are rounded, and their sum.
ERROR = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-7}


def check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    before = x.clone()
    got = rotary(x, cos, sin)
    assert torch.equal(x, before)
    exact = reference.rotary(x.double(), cos.double(), sin.double())
    first, second = x.double().abs().chunk(2, dim=-1)
    turned = torch.cat((second, first), dim=-1)
    size = x.double().abs() * cos.double().abs()[:, None] + turned * sin.double().abs()[:, None]
    assert got.dtype == x.dtype
    assert got.is_contiguous()
    assert bool(((got.double() - exact).abs() <= size * ERROR[x.dtype] + 1e-30).all())


def angles(num: int, dim: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines whose halves are not alike, as they may be."""
    found = torch.randn(num, dim, generator=torch.Generator().manual_seed(seed)) * 9
    return found.cos().to(dtype), found.sin().to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=25)
@given(
    num=st.integers(0, 9) | st.sampled_from([70, 257]),
    heads=st.integers(1, 6),
    dim=st.integers(1, 40).map(lambda half: 2 * half) | st.sampled_from([80, 96, 128, 256]),
    seed=st.integers(0, 1000),
)
def test_rotary(
    isa: str, threads: int, dtype: torch.dtype, num: int, heads: int, dim: int, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    fused = torch.randn(num, heads + 2, dim, generator=random).to(dtype)
    check(fused[:, 1 : 1 + heads], *angles(num, dim, seed, dtype))


def test_bfloat16_is_rounded_as_the_reference_s(isa: str) -> None:
    x = torch.randn(50, 3, 40).bfloat16()
    cos, sin = angles(50, 40, 0, torch.bfloat16)
    assert torch.equal(rotary(x, cos, sin), reference.rotary(x, cos, sin))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_and_non_contiguous(isa: str, dtype: torch.dtype) -> None:
    wide = torch.randn(5, 6, 91).to(dtype)
    cos, sin = angles(6, 41, 1, dtype)
    check(wide[:, 1:5, 1:41], cos[:5, 1:], sin[1:, :40])  # rows apart, starts unaligned
    check(wide.transpose(0, 1)[:5, :, 3:43], cos[:5, 1:], sin[:5, 1:])
    check(wide[:, :, 1:81:2], cos[:5, 1:], sin[:5, 1:])  # what a head holds apart
    apart = cos.T.contiguous().T, sin.T.contiguous().T
    check(wide[:, :, 1:41], apart[0][:5, 1:], apart[1][:5, 1:])


def test_nan_and_infinity_stay_in_their_pairs(isa: str) -> None:
    x = torch.ones(1, 2, 12)
    x[0, 0, 1], x[0, 1, 11] = float("nan"), float("inf")
    cos, sin = angles(1, 12, 2, torch.float32)
    torch.testing.assert_close(
        rotary(x, cos, sin), reference.rotary(x, cos, sin), equal_nan=True, rtol=1e-6, atol=1e-6
    )


def test_what_the_kernels_do_not_take_is_the_reference_s() -> None:
    x = torch.randn(3, 2, 8)
    cos, sin = angles(3, 8, 3, torch.float32)
    for other in (x.half(), x.double()):
        same = cos.to(other.dtype), sin.to(other.dtype)
        assert torch.equal(rotary(other, *same), reference.rotary(other, *same))
    mixed = rotary(x.bfloat16(), cos, sin)
    assert torch.equal(mixed, reference.rotary(x.bfloat16(), cos, sin))
    # One angle for all tokens: as far as shapes broadcast, it is no error.
    assert torch.equal(rotary(x, cos[:1], sin[:1]), reference.rotary(x, cos[:1], sin[:1]))
