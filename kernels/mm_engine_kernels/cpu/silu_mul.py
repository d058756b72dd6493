"""The gate of an MLP."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_engine_kernels import _cpu, reference
from mm_engine_kernels.cpu.extension import DTYPES, as_rows


def silu_mul(gate_up: Tensor) -> Tensor:
    """`reference.silu_mul`. Floor: `gate_up` read once, the result written once."""
    dtype = DTYPES.get(gate_up.dtype)
    width = gate_up.shape[-1]
    if dtype is None or width % 2:
        return reference.silu_mul(gate_up)
    rows = as_rows(gate_up, width)
    num, size = rows.shape[0], width // 2
    out = torch.empty((num, size), dtype=gate_up.dtype)
    _cpu.silu_mul(rows.data_ptr(), out.data_ptr(), num, size, rows.stride(0), dtype)
    return out if gate_up.dim() == 2 else out.view(*gate_up.shape[:-1], size)
