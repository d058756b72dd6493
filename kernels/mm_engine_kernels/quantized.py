"""The plain PyTorch meaning of quantised numbers: how they are made, and what multiplying means.

Shapes: a weight is `[N, K]` (out, in), activations are `[M, K]`. All is computed in float32 and
rounded once. Scales are rounded to the weight's dtype before anything is divided by them, so that
what a kernel reads is what the numbers were made with.
"""

from __future__ import annotations

import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn  # 4 bits of exponent, 3 of mantissa; no infinity, one NaN
FP8_MAX = 448.0
INT8_MAX = 127
INT4_ZERO = 8  # the number, of 0 to 15, that stands for a group's zero point


def to_fp8(x: Tensor) -> Tensor:
    """`x` rounded to FP8, saturated at ±448. NaN stays NaN, and infinity becomes NaN.

    Saturated infinity would pass for a number, and nobody would learn of the fault behind it.
    """
    return x.clamp(-FP8_MAX, FP8_MAX).masked_fill(~x.isfinite(), torch.nan).to(FP8)


def quantize_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """FP8 numbers `[..., K]` and float32 scales `[..., 1]`: each row fills FP8's range."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    scale = (largest / FP8_MAX).clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / scale).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def linear_fp8(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Rows of `x` are quantised, too, each by its own scale; `[M, K]` to `[M, N]` in x's dtype.

    `weight` and `scale` are `quantize_fp8`'s.
    """
    rows, row_scale = quantize_fp8(x)
    return ((rows.float() @ weight.float().t()) * row_scale * scale.t()).to(x.dtype)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers `[N, K]` from -127 to 127, and a scale for each row, `[N]` in the weight's dtype."""
    wide = weight.float()
    scale = _scale(wide.abs().amax(-1) / INT8_MAX, weight.dtype)
    numbers = (wide / scale.float()[:, None]).round_().clamp_(-INT8_MAX, INT8_MAX)
    return numbers.to(torch.int8), scale


def dequantize_int8(numbers: Tensor, scale: Tensor) -> Tensor:
    """The weight `[N, K]` that `quantize_int8` made the numbers of, up to rounding."""
    return numbers.to(scale.dtype) * scale[:, None]


def quantize_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Numbers `[N, K]` (int32) from 0 to 15, and scales and zero points `[K / group, N, 2]`.

    A number q of a group means `(q - 8) * scale + zero`: the layout of PyTorch's own kernels.
    """
    grouped = weight.float().unflatten(-1, (-1, group))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale = _scale((high - low) / 15, weight.dtype)
    zero = (low + INT4_ZERO * scale.float()).to(weight.dtype)
    numbers = (grouped - zero.float()[..., None]) / scale.float()[..., None] + INT4_ZERO
    numbers = numbers.round_().clamp_(0, 15).to(torch.int32).flatten(-2)
    return numbers, torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous()


def dequantize_int4(numbers: Tensor, scales: Tensor) -> Tensor:
    """The weight `[N, K]` that `quantize_int4` made the numbers of, up to rounding."""
    scale, zero = scales.transpose(0, 1).float().unbind(-1)  # [N, K / group]
    grouped = numbers.unflatten(-1, (scale.shape[1], -1))
    wide = (grouped - INT4_ZERO) * scale[..., None] + zero[..., None]
    return wide.flatten(-2).to(scales.dtype)


def pack_nibbles(numbers: Tensor) -> Tensor:
    """Numbers from 0 to 15 two to a byte, `[N, K / 2]`: the even column in the upper half."""
    return (numbers[:, ::2] << 4 | numbers[:, 1::2]).to(torch.uint8)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """What `pack_nibbles` packed, `[N, K]`, as bytes."""
    return torch.stack((packed >> 4, packed & 15), dim=-1).flatten(-2)


def _scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounded to `dtype` and never zero: rows of nothing but zeros are divided by it, too."""
    return scale.to(dtype).clamp(min=torch.finfo(dtype).tiny)
