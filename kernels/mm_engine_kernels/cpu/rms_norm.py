"""Root-mean-square norm, alone or with the addition to the residual stream before it."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_engine_kernels import _cpu, reference
from mm_engine_kernels.cpu.extension import DTYPES, as_rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`. Floor: the bytes of `x`, read once and written once."""
    dtype = DTYPES.get(x.dtype)
    size = x.shape[-1]
    if dtype is None or not _fits(weight, size, x.dtype):
        return reference.rms_norm(x, weight, eps)
    rows = as_rows(x, size)
    out = torch.empty_like(rows)  # contiguous, as rows don't overlap
    _cpu.rms_norm(
        rows.data_ptr(),
        0,
        weight.data_ptr(),
        out.data_ptr(),
        0,
        rows.shape[0],
        size,
        rows.stride(0),
        0,
        eps,
        dtype,
    )
    return out if x.dim() == 2 else out.view(x.shape)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`. Floor: `x` and `residual` read once, both results written once."""
    dtype = DTYPES.get(x.dtype)
    shape = x.shape
    size = shape[-1]
    if (
        dtype is None
        or residual.dtype != x.dtype
        or residual.shape != shape
        or not _fits(weight, size, x.dtype)
    ):
        return reference.add_rms_norm(x, residual, weight, eps)
    rows, others = as_rows(x, size), as_rows(residual, size)
    out, total = torch.empty_like(rows), torch.empty_like(rows)
    _cpu.rms_norm(
        rows.data_ptr(),
        others.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        total.data_ptr(),
        rows.shape[0],
        size,
        rows.stride(0),
        others.stride(0),
        eps,
        dtype,
    )
    return (out, total) if x.dim() == 2 else (out.view(shape), total.view(shape))


def _fits(weight: Tensor, size: int, dtype: torch.dtype) -> bool:
    return (
        weight.dtype == dtype
        and weight.dim() == 1
        and weight.shape[0] == size
        and weight.is_contiguous()
    )
