"""Attention of chunks of prompts, and of decodes beside them, by tiles over the paged cache."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mm_engine_kernels.triton.attention_parts import (
    bend,
    dot_dtype,
    find_slots,
    readable,
    scales,
    widen,
)
from mm_engine_kernels.triton.device import NO_CARD, capability


class PrefillTiles(NamedTuple):
    """How the work is cut: query rows of a program, keys at a time, stages of the pipeline."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


@triton.jit
def _attend(
    q,
    top,
    total,
    acc,
    keys,
    values,
    table,
    begin,
    end,
    query_position,
    scale,
    cap,
    key_stride_block,
    key_stride_slot,
    value_stride_block,
    value_stride_slot,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    MASKED: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Take in the keys from `begin` below `end`; unless MASKED every row sees them all."""
    d = tl.arange(0, TILE_D)
    for start in range(begin, end, TILE_N):
        block, offset = find_slots(table, start, end, BLOCK_SIZE, TILE_N)
        position = start + tl.arange(0, TILE_N)
        inside = (position < end)[None, :] & (d < HEAD)[:, None]
        rows = keys + block * key_stride_block + offset * key_stride_slot
        places = rows[None, :] + d[:, None]
        whole: tl.constexpr = not MASKED and HEAD == TILE_D
        k = tl.load(places) if whole else tl.load(places, mask=inside, other=0.0)
        scores = tl.dot(q, widen(k, DOT), input_precision=PRECISION)
        scores = bend(scores, scale, cap, CAPPED)
        if MASKED:
            seen = position[None, :] <= query_position[:, None]
            if WINDOW > 0:
                seen = seen & (position[None, :] > query_position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = new_top
        if MASKED:  # a row may have seen nothing so far
            base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        weights = tl.exp2(scores - base[:, None])
        total = total * shrink + tl.sum(weights, 1)
        rows = values + block * value_stride_block + offset * value_stride_slot
        places = rows[:, None] + d[None, :]
        v = tl.load(places) if whole else tl.load(places, mask=tl.trans(inside), other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(DOT), widen(v, DOT), acc, input_precision=PRECISION)
        top = new_top
    return top, total, acc


@triton.jit(
    do_not_specialize=["num_seqs", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "query_starts", "context_lens"],
)
def prefill_kernel(
    query,
    key_cache,
    value_cache,
    block_tables,
    query_starts,
    context_lens,
    out,
    num_seqs,
    scale,
    cap,
    query_stride_t,
    query_stride_h,
    key_stride_block,
    key_stride_slot,
    key_stride_h,
    value_stride_block,
    value_stride_slot,
    value_stride_h,
    out_stride_t,
    out_stride_h,
    table_stride,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: some queries of one sequence, with all heads of one key head."""
    TILE_Q: tl.constexpr = TILE_M // GROUP
    kv_head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # the last, longest ones start first
    # Sequence s owns the tiles from starts[s] // TILE_Q + s: never fewer than it needs.
    seq = 0
    above = num_seqs
    while above - seq > 1:
        middle = (seq + above) // 2
        if tl.load(query_starts + middle) // TILE_Q + middle <= tile:
            seq = middle
        else:
            above = middle
    start = tl.load(query_starts + seq)
    num_queries = tl.load(query_starts + seq + 1) - start
    first = (tile - start // TILE_Q - seq) * TILE_Q
    if first >= num_queries:
        return
    before = tl.load(context_lens + seq) - num_queries  # tokens ahead of the chunk
    i = tl.arange(0, TILE_M)
    index = first + i // GROUP
    head = kv_head * GROUP + i % GROUP
    is_row = (i < TILE_Q * GROUP) & (index < num_queries)
    token = (start + index).to(tl.int64)
    d = tl.arange(0, TILE_D)
    inside = is_row[:, None] & (d < HEAD)[None, :]
    places = query + token[:, None] * query_stride_t + head[:, None] * query_stride_h + d[None, :]
    q = tl.load(places, mask=inside, other=0.0).to(DOT)

    end = before + tl.minimum(first + TILE_Q, num_queries)
    low = 0
    middle = (before + first + 1) // TILE_N * TILE_N  # every row sees the keys below
    if WINDOW > 0:
        low = tl.maximum(before + first + 1 - WINDOW, 0) // TILE_N * TILE_N
        middle = low
    keys = key_cache + kv_head * key_stride_h
    values = value_cache + kv_head * value_stride_h
    table = block_tables + seq * table_stride
    top = tl.full([TILE_M], float("-inf"), tl.float32)
    total = tl.zeros([TILE_M], tl.float32)
    acc = tl.zeros([TILE_M, TILE_D], tl.float32)
    if WINDOW == 0:
        top, total, acc = _attend(
            q, top, total, acc, keys, values, table, low, middle, before + index, scale, cap,
            key_stride_block, key_stride_slot, value_stride_block, value_stride_slot,
            HEAD, BLOCK_SIZE, WINDOW, CAPPED, False, TILE_N, TILE_D, DOT, PRECISION,
        )  # fmt: skip
    top, total, acc = _attend(
        q, top, total, acc, keys, values, table, middle, end, before + index, scale, cap,
        key_stride_block, key_stride_slot, value_stride_block, value_stride_slot,
        HEAD, BLOCK_SIZE, WINDOW, CAPPED, True, TILE_N, TILE_D, DOT, PRECISION,
    )  # fmt: skip
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    places = out + token[:, None] * out_stride_t + head[:, None] * out_stride_h + d[None, :]
    tl.store(places, acc.to(out.dtype.element_ty), mask=inside)


def prefill_tiles(
    num_rows: int, head: int, query: torch.dtype, cache: torch.dtype, card: tuple[int, int]
) -> PrefillTiles:
    """Two shapes for each head size, by whether a sequence has more than 16 rows (queries x heads).

    More shapes would fit more steps, and each is a compilation at some step's cost. What doesn't
    fit registers or shared memory (227 KiB on 9.0 and up, 163 on 8.0, else 99) is kept smaller.
    """
    wide = triton.next_power_of_2(head)
    if card == NO_CARD:
        return PrefillTiles(16, 16, 4, 1)
    newest, large = card[0] >= 9, card[0] >= 9 or card == (8, 0)
    if query == torch.float32:  # no matrix units: small tiles, kept in registers
        return PrefillTiles(16, 16 if wide > 64 else 32, 4, 2)
    if num_rows <= 16:
        return PrefillTiles(16, 32 if wide > 128 else 64, 4, 3 if large else 2)
    if cache == torch.float8_e4m3fn and card < (8, 9):  # widened in integers
        return PrefillTiles(64, 32, 8 if wide > 128 else 4, 2)
    if wide > 128:
        return PrefillTiles(128, 32, 8, 2) if newest else PrefillTiles(64, 32, 8, 2)
    if wide > 64:
        longer = newest and cache.itemsize > 1
        return PrefillTiles(128, 128 if longer else 64, 8, 3 if large else 2)
    return PrefillTiles(128, 64, 4, 3 if large else 2)


def paged_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    max_query_len: int,
    out: Tensor | None = None,
    tiles: PrefillTiles | None = None,
) -> Tensor:
    """`reference.paged_prefill`. `tiles` is for tests and measurements.

    Floor: 4 * D flops for each (query, key it sees, head), at the rate of the matrix units. 128
    rows against 64 or 128 keys keep both products on them: a tile's keys and values are read once
    for 128 rows, mostly from the L2 cache, which 64 rows would wait for. Key tiles that every row
    sees carry no mask; those past the diagonal or behind the window are not visited. The heads of
    one key head lie in one tile, so that short chunks of grouped heads still fill it. The grid
    follows from T and S alone: each program finds its sequence.
    """
    num_tokens, num_heads, head = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    assert query.stride(-1) == key_cache.stride(-1) == value_cache.stride(-1) == 1
    if out is None:
        out = torch.empty((num_tokens, num_heads, head), dtype=query.dtype, device=query.device)
    num_seqs = context_lens.shape[0]
    if num_tokens == 0 or num_seqs == 0:
        return out
    group = num_heads // num_kv_heads
    if tiles is None:
        tiles = prefill_tiles(
            max_query_len * group, head, query.dtype, key_cache.dtype, capability(query)
        )
    tile_m = max(tiles.rows, triton.next_power_of_2(group))
    keys, values = readable(key_cache), readable(value_cache)
    prefill_kernel[(num_kv_heads, num_tokens // (tile_m // group) + num_seqs)](
        query,
        keys,
        values,
        block_tables,
        query_starts,
        context_lens,
        out,
        num_seqs,
        *scales(scale, softcap),
        query.stride(0),
        query.stride(1),
        keys.stride(0),
        keys.stride(1),
        keys.stride(2),
        values.stride(0),
        values.stride(1),
        values.stride(2),
        out.stride(0),
        out.stride(1),
        block_tables.stride(0),
        GROUP=group,
        HEAD=head,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window or 0,
        CAPPED=softcap is not None,
        TILE_M=tile_m,
        TILE_N=tiles.keys,
        TILE_D=max(16, triton.next_power_of_2(head)),
        DOT=dot_dtype(query),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    return out
