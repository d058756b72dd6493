"""A linear layer with weights of 8 or 4 bits, multiplied by activations of 8."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_engine_kernels import _cpu
from mm_engine_kernels.cpu.extension import DTYPES, address, check, rows_of

GROUP = 32  # neighbours in K that share a scale
PANEL = 16  # rows of the weight that lie together


def quantize_linear(weight: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
    """`weight` `[N, K]` in 8 or 4 bits: bytes and bfloat16 scales, in the kernels' layout.

    None if they don't take its dtype.

    Raises:
        ValueError: `bits` is neither 8 nor 4.
    """
    if bits not in (4, 8):
        raise ValueError(f"a weight can't be quantised to {bits} bits: use 8 or 4.")
    if weight.dtype not in DTYPES:
        return None
    rows, columns = weight.shape
    weight = rows_of(weight)
    panels, groups = -(-rows // PANEL), -(-columns // GROUP)
    data = torch.empty(panels * groups * PANEL * GROUP * bits // 8, dtype=torch.uint8)
    scales = torch.empty(panels, groups, PANEL, dtype=torch.bfloat16)
    _cpu.quantize_linear(
        weight.data_ptr(),
        data.data_ptr(),
        scales.data_ptr(),
        rows,
        columns,
        weight.stride(0),
        DTYPES[weight.dtype],
        bits,
    )
    return data, scales


def linear_quantized(
    x: Tensor, data: Tensor, scales: Tensor, rows: int, bits: int, bias: Tensor | None = None
) -> Tensor:
    """`x @ weight.T + bias`: `[M, K]` to `[M, rows]` in x's dtype.

    x is quantised to 8 bits on the way. A row that isn't finite gives NaN.
    """
    num, columns = x.shape
    if x.dtype not in DTYPES or -(-columns // GROUP) != scales.shape[1]:
        raise ValueError(f"x of {x.dtype} and shape {list(x.shape)} doesn't fit the weight.")
    if rows > scales.shape[0] * PANEL or data.numel() * 8 != scales.numel() * GROUP * bits:
        raise ValueError(f"the weight isn't one of {rows} rows and {bits} bits.")
    x = rows_of(x)
    if bias is not None:
        check("bias", bias, (rows,), x.dtype)
        bias = bias.contiguous()
    out = torch.empty((num, rows), dtype=x.dtype)
    _cpu.linear_quantized(
        x.data_ptr(),
        data.data_ptr(),
        scales.data_ptr(),
        address(bias),
        out.data_ptr(),
        num,
        rows,
        columns,
        x.stride(0),
        DTYPES[x.dtype],
        bits,
    )
    return out


def dequantize_linear(data: Tensor, scales: Tensor, rows: int, columns: int, bits: int) -> Tensor:
    """The weight `[rows, columns]` that the bytes and scales stand for, in float32."""
    panels, groups, _ = scales.shape
    if bits == 8:
        whole = data.view(torch.int8).view(panels, groups, GROUP // 4, PANEL, 4).float()
    else:
        both = data.view(panels, groups, GROUP // 8, 1, PANEL, 4)
        halves = torch.cat((both & 15, both >> 4), dim=3).float() - 8
        whole = halves.flatten(2, 3)
    by_row = whole.permute(0, 3, 1, 2, 4).reshape(panels, PANEL, groups, GROUP)
    weight = by_row * scales.float().transpose(1, 2)[..., None]
    return weight.reshape(panels * PANEL, groups * GROUP)[:rows, :columns]
