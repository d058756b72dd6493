"""How backends that only read the paged cache write to it: Triton's kernel, or PyTorch's copy."""

from __future__ import annotations

from collections.abc import Callable

import torch
from mm_engine_kernels import reference
from torch import Tensor

from mm_engine.attention.triton_paged import triton_fault

WriteKV = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]


def kv_writer() -> tuple[WriteKV, bool]:
    """`write_kv` as the reference has it, and whether it passes over rows with slot -1.

    One that doesn't can't be in a captured graph, whose steps are padded with such rows.
    """
    if triton_fault(torch.device("cuda")) is None:
        from mm_engine_kernels.triton.write_kv import write_kv

        return write_kv, True
    return reference.write_kv, False
