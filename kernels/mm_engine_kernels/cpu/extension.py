"""The compiled module, and what its callers share: dtypes, addresses, threads, instruction sets."""

from __future__ import annotations

import torch
from torch import Tensor

try:
    from mm_engine_kernels import _cpu
except ImportError as error:
    raise ImportError(f"the C++ kernels can't be loaded: {error}") from error

#: The dtypes that the kernels take, by their number in C++; tensors of others are the reference's.
DTYPES = {torch.float32: 0, torch.bfloat16: 1}

_cpu.set_num_threads(torch.get_num_threads())

isas = _cpu.isas
isa = _cpu.isa
num_threads = _cpu.num_threads
set_num_threads = _cpu.set_num_threads


def use_isa(name: str) -> None:
    """Run the kernels of the instruction set `name`, one of `isas()`, from now on.

    Raises:
        ValueError: they weren't built, or this CPU lacks it.
    """
    if not _cpu.use_isa(name):
        raise ValueError(
            f"this CPU runs no kernels for {name}. Use one of: {', '.join(_cpu.isas())}."
        )


def address(tensor: Tensor | None) -> int:
    """Where its numbers lie; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def rows_of(x: Tensor) -> Tensor:
    """`x` `[M, K]` with each row's numbers side by side; rows may lie apart. Copied if need be."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def as_rows(x: Tensor, size: int) -> Tensor:
    """`x` `[..., size]` as `[M, size]`, each row's numbers side by side. Copied if need be."""
    if x.dim() != 2:
        x = x.reshape(x.numel() // max(size, 1), size)
    return rows_of(x)


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise ValueError unless the tensor is of this shape and dtype."""
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {dtype} of shape {list(shape)}, not {tensor.dtype} of shape "
            f"{list(tensor.shape)}."
        )
