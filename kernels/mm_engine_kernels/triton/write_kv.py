"""Store a step's keys and values in the paged cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def to_e4m3(x):
    """float32 to the bits of float8_e4m3fn: to nearest, ties to even, saturating at 448.

    In integers, so that cards without the instruction (before 8.9) and the interpreter agree.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    size = tl.where(size >= 0x7F800000, size, tl.minimum(size, 0x43E00000))  # 448.0
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2**-6 steps are 2**-9 wide: adding 2**14 rounds to them.
    small = tl.minimum(size, 0x3C800000).to(tl.float32, bitcast=True) + 16384.0
    subnormal = small.to(tl.int32, bitcast=True) - 0x46800000
    value = tl.where(size < 0x3C800000, subnormal, normal)
    value = tl.where(size >= 0x7F800000, 0x7F, value)  # NaN; so is infinity, a fault's sign
    return (value | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def _store(source, cache, element, slot_block, slot_offset, stride_block, stride_slot, inside):
    x = tl.load(source, mask=inside)
    place = cache + slot_block * stride_block + slot_offset * stride_slot + element
    if cache.dtype.element_ty == tl.uint8:
        tl.store(place, to_e4m3(x.to(tl.float32)), mask=inside)
    else:
        tl.store(place, x.to(cache.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["slots"])
def write_kv_kernel(
    key,
    value,
    key_cache,
    value_cache,
    slots,
    key_stride_t,
    key_stride_h,
    value_stride_t,
    value_stride_h,
    key_stride_block,
    key_stride_slot,
    value_stride_block,
    value_stride_slot,
    BLOCK_SIZE: tl.constexpr,
    HEAD: tl.constexpr,
    ROW: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program stores one token."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    block, offset = slot // BLOCK_SIZE, slot % BLOCK_SIZE
    i = tl.arange(0, TILE)
    inside = i < ROW
    head, d = i // HEAD, i % HEAD
    source = key + token * key_stride_t + head * key_stride_h + d
    _store(source, key_cache, i, block, offset, key_stride_block, key_stride_slot, inside)
    source = value + token * value_stride_t + head * value_stride_h + d
    _store(source, value_cache, i, block, offset, value_stride_block, value_stride_slot, inside)


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """`reference.write_kv`. Floor: the bytes, each read once and written once.

    A program takes one token with all its heads, so a row of a cache is written in whole lines;
    with 8 warps even a row of 32 heads of 128 is two 16-byte accesses a thread.
    """
    num_tokens, num_heads, head = key.shape
    for x in (key, value, key_cache, value_cache):
        assert x.stride(-1) == 1
    assert key_cache.stride(2) == value_cache.stride(2) == head
    if key_cache.dtype == torch.float8_e4m3fn:
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    row = num_heads * head
    tile = triton.next_power_of_2(row)
    if num_tokens == 0:
        return
    write_kv_kernel[(num_tokens,)](
        key,
        value,
        key_cache,
        value_cache,
        slot_mapping,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        value_cache.stride(0),
        value_cache.stride(1),
        BLOCK_SIZE=key_cache.shape[1],
        HEAD=head,
        ROW=row,
        TILE=tile,
        num_warps=8 if tile >= 2048 else 4,
        enable_fp_fusion=True,
    )
