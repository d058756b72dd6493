"""Attention of one new token for each sequence, its context cut into splits ("flash-decoding")."""

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
from mm_engine_kernels.triton.device import NO_CARD, capability, num_processors

MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR = 4  # as many as keep enough bytes under way, and even out their ends


class DecodeTiles(NamedTuple):
    """How a program's loop is cut: keys at a time, and the stages of its pipeline."""

    keys: int
    num_warps: int
    num_stages: int


@triton.jit(
    do_not_specialize=["num_splits", "table_stride"],
    do_not_specialize_on_alignment=["block_tables", "context_lens"],
)
def decode_kernel(
    query,
    key_cache,
    value_cache,
    block_tables,
    context_lens,
    out,
    split_out,
    split_lse,
    num_splits,
    scale,
    cap,
    query_stride_s,
    query_stride_h,
    key_stride_block,
    key_stride_slot,
    key_stride_h,
    value_stride_block,
    value_stride_slot,
    value_stride_h,
    out_stride_s,
    out_stride_h,
    table_stride,
    NUM_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAPPED: tl.constexpr,
    SPLIT: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE_D: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program: one sequence, the query heads of one key head, one split of the context."""
    tiles_of_group: tl.constexpr = (GROUP + TILE_H - 1) // TILE_H
    kv_head = tl.program_id(0) // tiles_of_group
    in_group = tl.program_id(0) % tiles_of_group * TILE_H + tl.arange(0, TILE_H)
    seq = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    head = kv_head * GROUP + in_group
    is_head = in_group < GROUP
    d = tl.arange(0, TILE_D)
    is_dim = d < HEAD

    length = tl.load(context_lens + seq)
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    low = first // TILE_N * TILE_N
    share = tl.cdiv(tl.cdiv(length - low, num_splits), TILE_N) * TILE_N
    begin = low + split * share
    end = tl.minimum(begin + share, length)

    places = query + seq * query_stride_s + head[:, None] * query_stride_h + d[None, :]
    q = tl.load(places, mask=is_head[:, None] & is_dim[None, :], other=0.0).to(DOT)
    keys = key_cache + kv_head * key_stride_h
    values = value_cache + kv_head * value_stride_h
    table = block_tables + seq * table_stride
    top = tl.full([TILE_H], float("-inf"), tl.float32)
    total = tl.zeros([TILE_H], tl.float32)
    acc = tl.zeros([TILE_H, TILE_D], tl.float32)
    for start in range(begin, end, TILE_N):
        block, offset = find_slots(table, start, end, BLOCK_SIZE, TILE_N)
        position = start + tl.arange(0, TILE_N)
        seen = position < end
        if WINDOW > 0:
            seen = seen & (position >= first)
        rows = keys + block * key_stride_block + offset * key_stride_slot
        k = tl.load(rows[None, :] + d[:, None], mask=seen[None, :] & is_dim[:, None], other=0.0)
        scores = tl.dot(q, widen(k, DOT), input_precision=PRECISION)
        scores = tl.where(seen[None, :], bend(scores, scale, cap, CAPPED), float("-inf"))
        # Each tile holds a key that is seen: the new top is never -inf.
        new_top = tl.maximum(top, tl.max(scores, 1))
        shrink = tl.exp2(top - new_top)
        weights = tl.exp2(scores - new_top[:, None])
        total = total * shrink + tl.sum(weights, 1)
        rows = values + block * value_stride_block + offset * value_stride_slot
        v = tl.load(rows[:, None] + d[None, :], mask=seen[:, None] & is_dim[None, :], other=0.0)
        acc = acc * shrink[:, None]
        acc = tl.dot(weights.to(DOT), widen(v, DOT), acc, input_precision=PRECISION)
        top = new_top

    empty = total == 0.0  # nothing in this split, or a padding row
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    inside = is_head[:, None] & is_dim[None, :]
    if SPLIT:
        row = (seq * NUM_HEADS + head) * num_splits + split
        tl.store(split_out + row[:, None] * HEAD + d[None, :], acc, mask=inside)
        lse = tl.where(empty, float("-inf"), top + tl.log2(tl.where(empty, 1.0, total)))
        tl.store(split_lse + row, lse, mask=is_head)
    else:
        places = out + seq * out_stride_s + head[:, None] * out_stride_h + d[None, :]
        tl.store(places, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["num_splits"])
def merge_kernel(
    split_out,
    split_lse,
    out,
    num_splits,
    out_stride_s,
    out_stride_h,
    NUM_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    TILE_D: tl.constexpr,
    TILE_SPLITS: tl.constexpr,
):
    """One program: one head of one sequence, its splits weighed by their log-sum-exp."""
    head = tl.program_id(0)
    seq = tl.program_id(1).to(tl.int64)
    split, d = tl.arange(0, TILE_SPLITS), tl.arange(0, TILE_D)
    row = (seq * NUM_HEADS + head) * num_splits + split
    is_split, is_dim = split < num_splits, d < HEAD
    lse = tl.load(split_lse + row, mask=is_split, other=float("-inf"))
    top = tl.max(lse, 0)
    weights = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    total = tl.sum(weights, 0)
    inside = is_split[:, None] & is_dim[None, :]
    parts = tl.load(split_out + row[:, None] * HEAD + d[None, :], mask=inside, other=0.0)
    merged = tl.sum(weights[:, None] * parts, 0) / tl.where(total == 0.0, 1.0, total)
    places = out + seq * out_stride_s + head * out_stride_h + d
    tl.store(places, merged.to(out.dtype.element_ty), mask=is_dim)


def decode_tiles(head: int, itemsize: int, card: tuple[int, int]) -> DecodeTiles:
    """Keys and values of a stage take at most 32 KiB, so that several programs fit a processor.

    Three stages where the shared memory is large (8.0, 9.0 and up): block numbers are looked up
    two tiles ahead, keys and values one. Two stages on the others' 99 KiB.
    """
    if card == NO_CARD:
        return DecodeTiles(16, 4, 1)
    wide = max(itemsize, 2) * triton.next_power_of_2(head)
    keys = max(16, min(64, 16384 // wide))
    return DecodeTiles(keys, 4, 3 if card[0] >= 9 or card == (8, 0) else 2)


def choose_splits(num_programs: int, max_keys: int, keys_of_tile: int, processors: int) -> int:
    """A power of two: enough programs for every processor, each with at least two tiles."""
    wanted = PROGRAMS_PER_PROCESSOR * processors / num_programs
    splits = 1
    while splits < min(wanted, MAX_SPLITS) and 2 * splits * 2 * keys_of_tile <= max_keys:
        splits *= 2
    return splits


def paged_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    max_context_len: int,
    num_splits: int | None = None,
    out: Tensor | None = None,
    tiles: DecodeTiles | None = None,
) -> Tensor:
    """`reference.paged_decode`. `tiles` is for tests and measurements.

    Floor: the bytes of the cached keys and values, each read once. The query heads of one key
    head share a program, padded to the 16 rows of a matrix unit: at 4.8 TB/s even one head in 16
    rows keeps the units below a tenth of their rate. A small batch has too few (sequence, key
    head) pairs to fill a card, so each context is cut: a row's splits are equal shares of its own
    length, whatever the longest one's is. Nothing here depends on what the tensors hold, so a
    CUDA graph may replay it; `max_context_len` bounds every replay's.
    """
    num_seqs, num_heads, head = query.shape
    _, block_size, num_kv_heads, _ = key_cache.shape
    assert query.stride(-1) == key_cache.stride(-1) == value_cache.stride(-1) == 1
    if out is None:
        out = torch.empty((num_seqs, num_heads, head), dtype=query.dtype, device=query.device)
    if num_seqs == 0:
        return out
    group = num_heads // num_kv_heads
    tile_d = max(16, triton.next_power_of_2(head))
    tile_h = min(64, max(16, triton.next_power_of_2(group)))
    if tiles is None:
        tiles = decode_tiles(head, key_cache.element_size(), capability(query))
    programs = num_kv_heads * triton.cdiv(group, tile_h)
    if num_splits is None:
        max_keys = min(max_context_len, sliding_window or max_context_len)
        num_splits = choose_splits(programs * num_seqs, max_keys, tiles.keys, num_processors(query))
    num_splits = min(num_splits, MAX_SPLITS)
    split_out, split_lse = out, out
    if num_splits > 1:
        rows = (num_seqs, num_heads, num_splits)
        split_out = torch.empty((*rows, head), dtype=torch.float32, device=query.device)
        split_lse = torch.empty(rows, dtype=torch.float32, device=query.device)
    keys, values = readable(key_cache), readable(value_cache)
    decode_kernel[(programs, num_seqs, num_splits)](
        query,
        keys,
        values,
        block_tables,
        context_lens,
        out,
        split_out,
        split_lse,
        num_splits,
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
        NUM_HEADS=num_heads,
        GROUP=group,
        HEAD=head,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window or 0,
        CAPPED=softcap is not None,
        SPLIT=num_splits > 1,
        TILE_H=tile_h,
        TILE_N=tiles.keys,
        TILE_D=tile_d,
        DOT=dot_dtype(query),
        PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
        enable_fp_fusion=True,
    )
    if num_splits > 1:
        merge_kernel[(num_heads, num_seqs)](
            split_out,
            split_lse,
            out,
            num_splits,
            out.stride(0),
            out.stride(1),
            NUM_HEADS=num_heads,
            HEAD=head,
            TILE_D=tile_d,
            TILE_SPLITS=MAX_SPLITS,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
