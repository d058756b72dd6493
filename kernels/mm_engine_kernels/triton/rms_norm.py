"""Root-mean-square norm, alone or with the addition to the residual stream before it."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    total,
    eps,
    x_stride,
    residual_stride,
    SIZE: tl.constexpr,
    ADD: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: one row, held in registers between its two uses."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, TILE)
    inside = i < SIZE
    dtype = out.dtype.element_ty
    wide = tl.load(x + row * x_stride + i, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        wide += tl.load(residual + row * residual_stride + i, mask=inside, other=0.0).to(tl.float32)
        rounded = wide.to(dtype)
        tl.store(total + row * SIZE + i, rounded, mask=inside)
        wide = rounded.to(tl.float32)
    mean = tl.sum(wide * wide, 0) / SIZE
    normed = (wide * tl.rsqrt(mean + eps)).to(dtype).to(tl.float32)  # rounded as the reference is
    w = tl.load(weight + i, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * SIZE + i, (normed * w).to(dtype), mask=inside)


def _launch(
    x: Tensor, residual: Tensor, weight: Tensor, out: Tensor, total: Tensor, eps: float, add: bool
) -> None:
    size = x.shape[-1]
    rows = x.reshape(-1, size)  # a copy only where rows don't lie at one stride
    others = residual.reshape(-1, size)
    assert rows.stride(1) == others.stride(1) == 1
    tile = triton.next_power_of_2(size)
    if not rows.shape[0]:
        return
    rms_norm_kernel[(rows.shape[0],)](
        rows,
        others,
        weight,
        out,
        total,
        eps,
        rows.stride(0),
        others.stride(0),
        SIZE=size,
        ADD=add,
        TILE=tile,
        num_warps=min(16, max(4, tile // 512)),
        enable_fp_fusion=True,
    )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`. Floor: the bytes of `x`, read once and written once.

    A row stays in registers: 8 to 16 values a thread, which is one or two 16-byte accesses.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _launch(x, x, weight, out, out, eps, add=False)
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm`. Floor: two rows read and two written; apart it would be five.

    Tiled as `rms_norm`.
    """
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = torch.empty_like(out)
    _launch(x, residual, weight, out, total, eps, add=True)
    return out, total
