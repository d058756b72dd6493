"""What decode and prefill share: finding a tile's keys in their blocks, and bending scores."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_engine_kernels.triton.device import INTERPRETED, capability

LOG2E = 1.4426950408889634


@triton.jit
def find_slots(table, start, end, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr):
    """Block and place in it of the tokens from `start`, a multiple of TILE, below `end`.

    A tile that lies in one block looks it up once.
    """
    position = start + tl.arange(0, TILE)
    if BLOCK_SIZE % TILE == 0:
        block = tl.load(table + start // BLOCK_SIZE).to(tl.int64)
    else:
        block = tl.load(table + position // BLOCK_SIZE, mask=position < end, other=0).to(tl.int64)
    return block, position % BLOCK_SIZE


@triton.jit
def widen(x, DOT: tl.constexpr):
    """Cached values as the matrix units take them; uint8 holds the bits of float8_e4m3fn."""
    if x.dtype == tl.uint8:
        bits = x.to(tl.int16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        # Read as float16 the exponent is 8 too small.
        return (half.to(tl.float16, bitcast=True) * 256.0).to(DOT)
    return x.to(DOT)


@triton.jit
def bend(scores, scale, cap, CAPPED: tl.constexpr):
    """Scores in units of log 2: scaled, and with a soft cap bent to `cap * tanh(scores * scale)`.

    The exponent stays below zero, so that nothing overflows.
    """
    if CAPPED:
        x = scores * scale
        shrunk = tl.exp(-2.0 * tl.abs(x))
        size = (1.0 - shrunk) / (1.0 + shrunk)
        return cap * tl.where(x < 0, -size, size)
    return scores * scale


def scales(scale: float, softcap: float | None) -> tuple[float, float]:
    """The `scale` and `cap` of `bend`."""
    if softcap is None:
        return scale * LOG2E, 0.0
    return scale / softcap, softcap * LOG2E


def dot_dtype(query: Tensor) -> tl.dtype:
    """What is multiplied: the query's dtype, as its softmax weights are cast to it, too.

    The interpreter multiplies bfloat16 as if its bits were integers; it gets float32.
    """
    if INTERPRETED or query.dtype == torch.float32:
        return tl.float32
    return tl.bfloat16 if query.dtype == torch.bfloat16 else tl.float16


def readable(cache: Tensor) -> Tensor:
    """`cache`, as its bits where the card can't convert float8_e4m3fn itself (before 8.9)."""
    if cache.dtype == torch.float8_e4m3fn and not INTERPRETED and capability(cache) < (8, 9):
        return cache.view(torch.uint8)
    return cache
