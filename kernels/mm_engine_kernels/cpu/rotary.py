"""Rotary positions of queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_engine_kernels import _cpu, reference
from mm_engine_kernels.cpu.extension import DTYPES, rows_of


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rotary`. Floor: the bytes of `x`, read once and written once.

    `x` may be a slice of the fused projection: nothing is copied first.
    """
    num, heads, dim = x.shape
    kind = x.dtype
    dtype = DTYPES.get(kind)
    shape = (num, dim)
    if (
        dtype is None
        or dim % 2
        or cos.dtype != kind
        or sin.dtype != kind
        or cos.shape != shape
        or sin.shape != shape
    ):
        return reference.rotary(x, cos, sin)
    if x.stride(2) != 1:
        x = x.contiguous()
    cos, sin = rows_of(cos), rows_of(sin)
    out = torch.empty((num, heads, dim), dtype=kind)
    _cpu.rotary(
        x.data_ptr(),
        cos.data_ptr(),
        sin.data_ptr(),
        out.data_ptr(),
        num,
        heads,
        dim // 2,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        dtype,
    )
    return out
