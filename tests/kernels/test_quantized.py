"""Quantised numbers are off by no more than their rounding, and mean the same when read back."""

from __future__ import annotations

import math

import pytest
import torch
from mm_engine_kernels import quantized
from mm_engine_kernels.quantized import FP8
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def spacing(x: Tensor) -> Tensor:
    """The distance between FP8's numbers around `x` (below 448)."""
    exponent = x.abs().clamp(min=2.0**-6).log2().floor()
    return torch.exp2(exponent - 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 33, 128])
def test_fp8_is_off_by_half_a_step(columns: int, dtype: torch.dtype) -> None:
    weight = noise(9, columns, dtype=dtype) * torch.logspace(-3, 3, 9).to(dtype)[:, None]
    numbers, scale = quantized.quantize_fp8(weight)
    assert numbers.dtype == FP8 and scale.shape == (9, 1)
    scaled = weight.float() / scale
    assert torch.allclose(scaled.abs().amax(1), torch.tensor(448.0))  # the range is used up
    off = (numbers.float() - scaled).abs()
    assert (off <= spacing(scaled.clamp(-447, 447)) / 2 + 1e-5).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("columns", [1, 7, 33, 128])
def test_int8_is_off_by_half_a_step(columns: int, dtype: torch.dtype) -> None:
    weight = noise(9, columns, dtype=dtype) * torch.logspace(-2, 2, 9).to(dtype)[:, None]
    numbers, scale = quantized.quantize_int8(weight)
    assert numbers.dtype == torch.int8 and scale.dtype == dtype and scale.shape == (9,)
    assert (numbers.abs().amax(1) >= 126).all() and (numbers != -128).all()
    off = (numbers.float() * scale.float()[:, None] - weight.float()).abs()
    # A scale of 8 bits is off by up to 2^-9, and the largest number with it.
    assert (off <= scale.float()[:, None] * (0.5 + 127 * torch.finfo(dtype).eps / 2)).all()
    back = quantized.dequantize_int8(numbers, scale)
    assert torch.allclose(back.float(), numbers.float() * scale.float()[:, None], rtol=1e-2)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("columns", "group"), [(32, 32), (96, 32), (192, 64), (256, 128)])
def test_int4_is_off_by_half_a_step(columns: int, group: int, dtype: torch.dtype) -> None:
    # Each group lies elsewhere: a neighbour's zero point or scale would be far off.
    shift = torch.arange(columns // group).repeat_interleave(group) - 1
    weight = ((noise(5, columns) * (1 + shift.abs()) + shift) / 10).to(dtype)
    numbers, scales = quantized.quantize_int4(weight, group)
    assert scales.shape == (columns // group, 5, 2) and scales.dtype == dtype
    assert numbers.min() == 0 and numbers.max() == 15
    scale, zero = (part.t().repeat_interleave(group, 1).float() for part in scales.unbind(-1))
    off = ((numbers - 8) * scale + zero - weight.float()).abs()
    eps = torch.finfo(dtype).eps
    assert (off <= 0.5 * scale + 8 * eps * scale + eps * zero.abs() + 1e-6).all()
    back = quantized.dequantize_int4(numbers, scales)
    assert torch.allclose(back.float(), (numbers - 8) * scale + zero, rtol=1e-2, atol=1e-2)


def test_an_even_column_is_in_the_upper_half_of_its_byte() -> None:
    numbers = torch.tensor([[1, 2, 15, 0], [3, 4, 5, 6]], dtype=torch.int32)
    packed = quantized.pack_nibbles(numbers)
    assert packed.tolist() == [[0x12, 0xF0], [0x34, 0x56]]
    assert quantized.unpack_nibbles(packed).tolist() == numbers.tolist()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0, 1e-6])
def test_rows_of_one_value_are_kept(value: float, dtype: torch.dtype) -> None:
    weight = torch.full((3, 64), value).to(dtype)
    expected = weight.float()
    for got in (
        torch.mul(*(part.float() for part in quantized.quantize_fp8(weight))),
        quantized.dequantize_int8(*quantized.quantize_int8(weight)).float(),
        quantized.dequantize_int4(*quantized.quantize_int4(weight, 32)).float(),
    ):
        assert got.isfinite().all()
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-4 if value == 1e-6 else 0)


def test_fp8_saturates_and_keeps_nan() -> None:
    x = torch.tensor([0.0, 448.0, 449.0, -1e30, 2.0**-9, math.inf, -math.inf, math.nan])
    got = quantized.to_fp8(x).float()
    assert got[:5].tolist() == [0.0, 448.0, 448.0, -448.0, 2.0**-9]
    assert got[5:].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_of_activations_that_is_not_finite_stays_so_and_spoils_no_other(bad: float) -> None:
    x = noise(3, 32)
    x[1, 5] = bad
    out = quantized.linear_fp8(x, *quantized.quantize_fp8(noise(4, 32)))
    assert out[1].isnan().all() and out[[0, 2]].isfinite().all()
