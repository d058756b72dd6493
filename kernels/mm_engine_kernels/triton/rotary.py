"""Rotary positions of queries and keys."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotary_kernel(
    x,
    cos,
    sin,
    out,
    x_stride_t,
    x_stride_h,
    cos_stride,
    sin_stride,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_HALF: tl.constexpr,
):
    """One program: all heads of one token, so that its cosines are read once."""
    token = tl.program_id(0).to(tl.int64)
    head, d = tl.arange(0, TILE_H)[:, None], tl.arange(0, TILE_HALF)
    is_half = d < HALF
    inside = (head < HEADS) & is_half[None, :]
    dtype = out.dtype.element_ty
    cosines, sines = cos + token * cos_stride + d, sin + token * sin_stride + d
    cos_1 = tl.load(cosines, mask=is_half, other=0.0).to(tl.float32)[None, :]
    cos_2 = tl.load(cosines + HALF, mask=is_half, other=0.0).to(tl.float32)[None, :]
    sin_1 = tl.load(sines, mask=is_half, other=0.0).to(tl.float32)[None, :]
    sin_2 = tl.load(sines + HALF, mask=is_half, other=0.0).to(tl.float32)[None, :]
    places = x + token * x_stride_t + head * x_stride_h + d[None, :]
    first = tl.load(places, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(places + HALF, mask=inside, other=0.0).to(tl.float32)
    # Products are rounded, as the reference's are.
    new_first = (first * cos_1).to(dtype).to(tl.float32) - (second * sin_1).to(dtype).to(tl.float32)
    new_second = (second * cos_2).to(dtype).to(tl.float32) + (first * sin_2).to(dtype).to(
        tl.float32
    )
    places = out + (token * HEADS + head) * (2 * HALF) + d[None, :]
    tl.store(places, new_first.to(dtype), mask=inside)
    tl.store(places + HALF, new_second.to(dtype), mask=inside)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`reference.rotary`. Floor: the bytes of `x`, read once and written once.

    `x` may be a slice of the fused projection: nothing is copied first.
    """
    num_tokens, heads, head = x.shape
    assert x.stride(2) == cos.stride(1) == sin.stride(1) == 1 and head % 2 == 0
    out = torch.empty((num_tokens, heads, head), dtype=x.dtype, device=x.device)
    if not num_tokens:
        return out
    tile_h, tile_half = triton.next_power_of_2(heads), triton.next_power_of_2(head // 2)
    rotary_kernel[(num_tokens,)](
        x,
        cos,
        sin,
        out,
        x.stride(0),
        x.stride(1),
        cos.stride(0),
        sin.stride(0),
        HEADS=heads,
        HALF=head // 2,
        TILE_H=tile_h,
        TILE_HALF=tile_half,
        num_warps=min(16, max(2, tile_h * tile_half // 256)),
        enable_fp_fusion=True,
    )
    return out
