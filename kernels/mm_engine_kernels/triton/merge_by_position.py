"""Put the features of images among a prompt's embeddings."""

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit(do_not_specialize_on_alignment=["positions"])
def merge_by_position_kernel(
    embeddings,
    rows,
    positions,
    embeddings_stride,
    rows_stride,
    SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: a tile of one row."""
    row = tl.program_id(0).to(tl.int64)
    position = tl.load(positions + row).to(tl.int64)
    i = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = i < SIZE
    x = tl.load(rows + row * rows_stride + i, mask=inside)
    place = embeddings + position * embeddings_stride + i
    tl.store(place, x.to(embeddings.dtype.element_ty), mask=inside)


def merge_by_position(embeddings: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """`reference.merge_by_position`. Floor: the bytes of `rows`, read once and written once.

    The cast to the embeddings' dtype happens on the way.
    """
    num, size = rows.shape
    assert embeddings.stride(1) == rows.stride(1) == 1
    if num:
        merge_by_position_kernel[(num, triton.cdiv(size, TILE))](
            embeddings,
            rows,
            positions,
            embeddings.stride(0),
            rows.stride(0),
            SIZE=size,
            TILE=min(TILE, triton.next_power_of_2(size)),
            num_warps=4,
            enable_fp_fusion=True,
        )
    return embeddings
