"""Rows of a table by their numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_engine_kernels import _cpu, reference
from mm_engine_kernels.cpu.extension import DTYPES, rows_of


def gather_rows(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.gather_rows`. Floor: the bytes of the rows, read once and written once.

    Raises:
        IndexError: the table has no such row.
    """
    kind, out_kind = DTYPES.get(table.dtype), DTYPES.get(dtype)
    if kind is None or out_kind is None or rows.dtype != torch.int64 or rows.dim() != 1:
        return reference.gather_rows(table, rows, dtype)
    table, rows = rows_of(table), rows.contiguous()
    num, size = rows.shape[0], table.shape[1]
    out = torch.empty((num, size), dtype=dtype)
    _cpu.gather(
        table.data_ptr(),
        rows.data_ptr(),
        out.data_ptr(),
        num,
        size,
        table.stride(0),
        table.shape[0],
        kind,
        out_kind,
    )
    return out
