"""Images' embeddings into a prompt's."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_engine_kernels import _cpu, reference
from mm_engine_kernels.cpu.extension import DTYPES, rows_of


def merge_by_position(embeddings: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """`reference.merge_by_position`. Floor: the bytes of `rows`, read once and written once.

    Raises:
        IndexError: a position is not one of `embeddings`. Nothing is written.
    """
    dtype, out_dtype = DTYPES.get(rows.dtype), DTYPES.get(embeddings.dtype)
    num_places, size = embeddings.shape
    if (
        dtype is None
        or out_dtype is None
        or (embeddings.stride(1) != 1 and size > 1)
        or rows.shape != (*positions.shape, size)
        or positions.dtype != torch.int64
    ):
        return reference.merge_by_position(embeddings, rows, positions)
    rows, positions = rows_of(rows), positions.contiguous()
    _cpu.scatter(
        rows.data_ptr(),
        embeddings.data_ptr(),
        positions.data_ptr(),
        rows.shape[0],
        size,
        rows.stride(0),
        1,
        embeddings.stride(0),
        0,
        num_places,
        dtype,
        out_dtype,
    )
    return embeddings
