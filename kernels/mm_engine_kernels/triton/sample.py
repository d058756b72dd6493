"""Drawing a token from each row, cut by top-k, top-p and min-p, without sorting the vocabulary.

The order of a sort isn't needed, only where it would be cut: at a weight t such that the tokens
above it stay, those below go, and of those at t the first ids stay. Weights are positive floats,
whose bits, read as integers, lie in the same order: t is searched for among them, by counting (or
summing) what is not below four candidates in one pass over the row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_engine_kernels.triton.device import INTERPRETED

ONE = tl.constexpr(0x3F800000)  # the bits of 1.0, the largest weight


@triton.jit
def _weigh(logits, weights, temperature, size, TILE: tl.constexpr):
    """Write exp(x / temperature - its maximum) of one row to `weights`; returns their sum."""
    top = tl.full([TILE], float("-inf"), tl.float32)
    for start in range(0, size, TILE):
        i = start + tl.arange(0, TILE)
        top = tl.maximum(top, tl.load(logits + i, mask=i < size, other=float("-inf")))
    # Divided as the reference divides, so that the same weights are tied.
    largest = tl.div_rn(tl.max(top, 0), temperature)
    total = tl.zeros([TILE], tl.float64)
    for start in range(0, size, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(logits + i, mask=i < size, other=float("-inf"))
        weight = tl.exp(tl.div_rn(x, temperature) - largest)
        total += weight.to(tl.float64)
        tl.store(weights + i, weight, mask=i < size)
    return tl.sum(total, 0)


@triton.jit
def _measure(weights, size, lowest, step, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """How many weights (BY_MASS: their sum) have bits of at least lowest + step, + 2 step, …"""
    sum_1 = tl.zeros([TILE], tl.float32)
    sum_2 = tl.zeros([TILE], tl.float32)
    sum_3 = tl.zeros([TILE], tl.float32)
    sum_4 = tl.zeros([TILE], tl.float32)
    for start in range(0, size, TILE):
        i = start + tl.arange(0, TILE)
        weight = tl.load(weights + i, mask=i < size, other=0.0)
        above = weight.to(tl.int32, bitcast=True) - lowest
        value = weight if BY_MASS else tl.where(i < size, 1.0, 0.0)
        sum_1 += tl.where(above >= step, value, 0.0)
        sum_2 += tl.where(above >= 2 * step, value, 0.0)
        sum_3 += tl.where(above >= 3 * step, value, 0.0)
        sum_4 += tl.where(above >= 4 * step, value, 0.0)
    return (
        tl.sum(sum_1.to(tl.float64), 0),
        tl.sum(sum_2.to(tl.float64), 0),
        tl.sum(sum_3.to(tl.float64), 0),
        tl.sum(sum_4.to(tl.float64), 0),
    )


@triton.jit
def _search(weights, size, low, wanted, BY_MASS: tl.constexpr, TILE: tl.constexpr):
    """The largest bits that as many weights as `wanted` (BY_MASS: with that sum) don't fall below.

    At least `low`. Counting may stop above the largest, where just as many don't fall below.
    """
    high = low * 0 + ONE + 1
    exact = low < 0  # False, as a tensor
    while (high - low > 1) & (not exact):
        step = tl.maximum((high - low) // 5, 1)
        sum_1, sum_2, sum_3, sum_4 = _measure(weights, size, low, step, BY_MASS, TILE)
        enough = (
            (sum_1 >= wanted).to(tl.int32)
            + (sum_2 >= wanted).to(tl.int32)
            + (sum_3 >= wanted).to(tl.int32)
            + (sum_4 >= wanted).to(tl.int32)
        )
        if not BY_MASS:
            exact = (sum_1 == wanted) | (sum_2 == wanted) | (sum_3 == wanted) | (sum_4 == wanted)
        high = tl.where(enough == 4, high, tl.minimum(high, low + (enough + 1) * step))
        low = low + enough * step
    return low


@triton.jit
def _around(weights, size, edge, TILE: tl.constexpr):
    """How many weights lie above the bits `edge`, their sum, and how many lie at it."""
    num_above = tl.zeros([TILE], tl.float32)
    mass_above = tl.zeros([TILE], tl.float32)
    num_at = tl.zeros([TILE], tl.float32)
    for start in range(0, size, TILE):
        i = start + tl.arange(0, TILE)
        weight = tl.load(weights + i, mask=i < size, other=0.0)
        bits = weight.to(tl.int32, bitcast=True)
        num_above += tl.where(bits > edge, 1.0, 0.0)
        mass_above += tl.where(bits > edge, weight, 0.0)
        num_at += tl.where((bits == edge) & (i < size), 1.0, 0.0)
    above = tl.sum(num_above.to(tl.float64), 0)
    return above, tl.sum(mass_above.to(tl.float64), 0), tl.sum(num_at.to(tl.float64), 0)


@triton.jit
def _kept(weights, i, size, edge, ties_end, floor, TIES: tl.constexpr):
    """Weights that are kept, zero for the others; TIES: one for each weight at the edge."""
    weight = tl.load(weights + i, mask=i < size, other=0.0)
    bits = weight.to(tl.int32, bitcast=True)
    if TIES:
        return tl.where((bits == edge) & (i < size), 1.0, 0.0)
    stays = (bits > edge) | ((bits == edge) & (i < ties_end))
    return tl.where(stays & (weight >= floor), weight, 0.0)


@triton.jit
def _cross(weights, size, edge, ties_end, floor, goal, TIES: tl.constexpr, TILE: tl.constexpr):
    """The first id at which the running sum of `_kept` exceeds `goal`, or the last id kept."""
    total = goal * 0.0
    before = goal * 0.0  # the sum ahead of the tile in which it happens
    found = -1
    last = 0
    for start in range(0, size, TILE):
        i = start + tl.arange(0, TILE)
        value = _kept(weights, i, size, edge, ties_end, floor, TIES)
        last = tl.maximum(last, tl.max(tl.where(value > 0.0, i, 0), 0))
        new_total = total + tl.sum(value.to(tl.float64), 0)
        here = (found < 0) & (new_total > goal)
        found = tl.where(here, start, found)
        before = tl.where(here, total, before)
        total = new_total
    if found >= 0:
        i = found + tl.arange(0, TILE)
        value = _kept(weights, i, size, edge, ties_end, floor, TIES)
        sums = before + tl.cumsum(value.to(tl.float64), 0)
        last_here = tl.max(tl.where(value > 0.0, i, 0), 0)  # sums are rounded: it may be this one
        last = tl.min(tl.where((sums > goal) & (value > 0.0), i, last_here), 0)
    return last


@triton.jit(do_not_specialize_on_alignment=["uniform", "temperature", "top_k", "top_p", "min_p"])
def sample_kernel(
    logits,
    uniform,
    temperature,
    top_k,
    top_p,
    min_p,
    weights,
    kept_weights,
    sampled,
    logits_stride,
    size,
    SHOW: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program: one row. SHOW writes what is kept of its weights, and zeros."""
    row = tl.program_id(0).to(tl.int64)
    own = weights + row * size
    mass = _weigh(logits + row * logits_stride, own, tl.load(temperature + row), size, TILE)
    tl.debug_barrier()  # weights are read by other threads than those that wrote them
    k = tl.load(top_k + row).to(tl.int32)
    p = tl.load(top_p + row)
    floor = tl.load(min_p + row)
    edge = tl.minimum(k, 0)  # the bits of 0.0
    num_at = mass * 0.0 + size
    num_ties = num_at  # how many of the weights at the edge stay
    if k < size:
        edge = _search(own, size, edge, k.to(tl.float64), False, TILE)
        num_above, mass_above, num_at = _around(own, size, edge, TILE)
        num_ties = tl.minimum(k - num_above, num_at)
        mass = mass_above + num_ties * edge.to(tl.float32, bitcast=True).to(tl.float64)
    if p < 1.0:
        wanted = mass * p.to(tl.float64)
        edge_p = _search(own, size, edge, wanted, True, TILE)
        num_above, mass_above, num_at = _around(own, size, edge_p, TILE)
        weight = edge_p.to(tl.float32, bitcast=True).to(tl.float64)
        # The token that reaches the mass stays, and the likeliest stays in any case.
        needed = tl.ceil((wanted - mass_above) / tl.where(weight > 0.0, weight, 1.0))
        needed = tl.maximum(needed, tl.where(num_above == 0.0, 1.0, 0.0))
        num_ties = tl.where(edge_p == edge, tl.minimum(num_ties, needed), needed)
        edge = edge_p
    ties_end = tl.minimum(k, 0) + size
    if num_ties < num_at:
        ties_end = _cross(own, size, edge, size, floor, num_ties - 0.5, True, TILE) + 1
        ties_end = tl.where(num_ties < 0.5, 0, ties_end)
    kept = tl.zeros([TILE], tl.float64)
    for start in range(0, size, TILE):
        i = start + tl.arange(0, TILE)
        weight = _kept(own, i, size, edge, ties_end, floor, False)
        kept += weight.to(tl.float64)
        if SHOW:
            tl.store(kept_weights + row * size + i, weight, mask=i < size)
    goal = tl.load(uniform + row).to(tl.float64) * tl.sum(kept, 0)
    token = _cross(own, size, edge, ties_end, floor, goal, False, TILE)
    tl.store(sampled + row, token.to(tl.int64))


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    *,
    tile: int | None = None,
    kept: Tensor | None = None,
) -> Tensor:
    """`reference.sample`, up to the rounding of its sums.

    `tile` is for tests, and so is `kept` `[N, V]` float32, which gets the weights that are kept.

    Floor: the bytes of the logits, read once. A row is one program's: its weights are written
    once, then read from the L2 cache in some 20 passes (fewer without top-k or top-p, which cost
    at most 13 each), 4096 at a time by 16 warps: about 10 microseconds a pass for 150,000 ids,
    whatever the number of rows up to the card's number of processors. A sort reads and writes
    ids and weights through memory several times for every row.
    """
    num, size = logits.shape
    assert logits.dtype == torch.float32 and logits.stride(1) == 1
    sampled = torch.empty(num, dtype=torch.int64, device=logits.device)
    if num == 0:
        return sampled
    if tile is None:
        tile = min(1 << 15 if INTERPRETED else 4096, triton.next_power_of_2(size))
    weights = torch.empty((num, size), dtype=torch.float32, device=logits.device)
    sample_kernel[(num,)](
        logits,
        uniform,
        temperature,
        top_k,
        top_p,
        min_p,
        weights,
        weights if kept is None else kept,
        sampled,
        logits.stride(0),
        size,
        SHOW=kept is not None,
        TILE=tile,
        num_warps=16,
        enable_fp_fusion=True,
    )
    return sampled
