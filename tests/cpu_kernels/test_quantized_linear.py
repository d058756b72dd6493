"""Weights of 8 and 4 bits: how near they are to the weight, and their product with 8-bit rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels.cpu.quantized import (
    GROUP,
    dequantize_linear,
    linear_quantized,
)
from mm_engine_kernels.cpu.quantized import quantize_linear as quantize_or_none
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def quantize_linear(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    made = quantize_or_none(weight, bits)
    assert made is not None
    return made


def in_bytes(x: Tensor) -> tuple[Tensor, Tensor]:
    """`x` `[M, K]` as the kernels quantise it, in float64, and how far off it may be.

    A number half way between two may be rounded either way.
    """
    width = -(-x.shape[1] // GROUP) * GROUP
    groups = torch.nn.functional.pad(x.float(), (0, width - x.shape[1])).unflatten(1, (-1, GROUP))
    most = groups.abs().amax(-1, keepdim=True)
    scaled = groups * torch.where(most > 1e-30, 127.0 / most, 0.0)
    step = (most / 127.0).double()
    near_half = ((scaled - scaled.floor()) - 0.5).abs() < 1e-4
    rows, off = scaled.round() * step, near_half * step
    return rows.flatten(1)[:, : x.shape[1]], off.flatten(1)[:, : x.shape[1]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [8, 4], ids="{} bits".format)
@settings(max_examples=40)
@given(
    m=st.integers(1, 20) | st.sampled_from([49, 130]),
    n=st.integers(1, 80) | st.sampled_from([127, 1040]),
    k=st.integers(1, 140) | st.sampled_from([256, 1030]),
    with_bias=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_products(
    isa: str,
    threads: int,
    bits: int,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    with_bias: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    x, weight, bias = (
        torch.randn(*shape, generator=random).to(dtype) for shape in ((m, k), (n, k), (n,))
    )
    data, scales = quantize_linear(weight, bits)
    plain = dequantize_linear(data, scales, n, k, bits).double()
    got = linear_quantized(x, data, scales, n, bits, bias if with_bias else None)
    assert got.dtype == dtype
    rows, off = in_bytes(x)
    exact = rows @ plain.T + (bias.double() if with_bias else 0)
    size = rows.abs() @ plain.abs().T + 1
    step = 1.2e-7 if dtype == torch.float32 else 2.0**-8
    slack = off @ plain.abs().T + size * 2e-6
    bound = slack + (exact.abs() + slack) * step
    assert bool(((got.double() - exact).abs() <= bound).all())


def relative_error(plain: Tensor, weight: Tensor) -> float:
    return float((plain - weight).pow(2).mean().sqrt() / weight.pow(2).mean().sqrt())


def as_llama_cpp(weight: Tensor, bits: int) -> Tensor:
    """The weight after Q8_0 or Q4_0: a float16 scale for 32 numbers, which the largest sets."""
    groups = weight.unflatten(1, (-1, GROUP))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = largest.abs() / 127 if bits == 8 else largest / -8
    low, high = (-127, 127) if bits == 8 else (-8, 7)
    whole = (groups / scale).round().clamp(low, high)
    return (whole * scale.half().float()).flatten(1)


@pytest.mark.parametrize("bits", [8, 4])
def test_error_of_the_weight_is_no_worse_than_llama_cpps(isa: str, bits: int) -> None:
    weight = torch.randn(400, 640, generator=torch.Generator().manual_seed(1))
    plain = dequantize_linear(*quantize_linear(weight, bits), 400, 640, bits)
    theirs = relative_error(as_llama_cpp(weight, bits), weight)
    assert 0 < relative_error(plain, weight) <= theirs


def test_every_instruction_set_quantises_alike() -> None:
    from mm_engine_kernels.cpu import extension

    weight = torch.randn(33, 100)
    before, made = extension.isa(), []
    for name in extension.isas():
        extension.use_isa(name)
        made.append(quantize_linear(weight, 8))
    extension.use_isa(before)
    for other in made[1:]:
        assert all(torch.equal(a, b) for a, b in zip(made[0], other, strict=True))


@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_its_neighbours(isa: str, bits: int) -> None:
    x = torch.randn(37, 100)
    data, scales = quantize_linear(torch.randn(50, 100), bits)
    together = linear_quantized(x, data, scales, 50, bits)
    for i in (0, 5, 36):
        assert torch.equal(linear_quantized(x[i : i + 1], data, scales, 50, bits)[0], together[i])


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_gives_nan_in_its_row_alone(isa: str, bits: int) -> None:
    x = torch.ones(3, 64)
    x[0, 5], x[2, 40] = float("nan"), float("inf")
    out = linear_quantized(x, *quantize_linear(torch.ones(20, 64), bits), 20, bits)
    assert bool(out[[0, 2]].isnan().all()) and bool(out[1].isfinite().all())


@pytest.mark.parametrize("bits", [8, 4])
def test_zeros_and_no_rows(isa: str, bits: int) -> None:
    packed = quantize_linear(torch.zeros(5, 33), bits)
    assert torch.equal(linear_quantized(torch.zeros(2, 33), *packed, 5, bits), torch.zeros(2, 5))
    assert linear_quantized(torch.zeros(0, 33), *packed, 5, bits).shape == (0, 5)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_numbers_do_not_overflow(isa: str, bits: int) -> None:
    """All at the ends of their range: no pair of products may be cut off."""
    weight = torch.where(torch.arange(64) % 2 == 0, 1.0, -1.0).expand(20, 64).contiguous()
    data, scales = quantize_linear(weight, bits)
    plain = dequantize_linear(data, scales, 20, 64, bits)
    for x in (torch.ones(1, 64), -torch.ones(1, 64), weight[:1]):
        got = linear_quantized(x, data, scales, 20, bits)
        torch.testing.assert_close(got, x @ plain.T, rtol=1e-5, atol=1e-4)


def test_what_does_not_fit_is_refused() -> None:
    data, scales = quantize_linear(torch.randn(6, 40), 8)
    with pytest.raises(ValueError, match="doesn't fit"):
        linear_quantized(torch.randn(1, 70), data, scales, 6, 8)
    with pytest.raises(ValueError, match="isn't one of 6 rows and 4 bits"):
        linear_quantized(torch.randn(1, 40), data, scales, 6, 4)
    with pytest.raises(ValueError, match="use 8 or 4"):
        quantize_linear(torch.randn(6, 40), 5)
    assert quantize_or_none(torch.randn(6, 40).half(), 8) is None
