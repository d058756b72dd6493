"""Keys and values to their places in the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_engine_kernels import _cpu, reference
from mm_engine_kernels.cpu.extension import DTYPES


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """`reference.write_kv`. Floor: the bytes of the keys and values, read once and written once.

    Caches of float32 and bfloat16 whose blocks lie whole, however far apart; others are left to
    the reference.

    Raises:
        IndexError: the cache has no such slot, and -1 is for padding. Nothing is written.
    """
    num, heads, dim = key.shape
    size = heads * dim
    dtype, cache_dtype = DTYPES.get(key.dtype), DTYPES.get(key_cache.dtype)
    if (
        dtype is None
        or cache_dtype is None
        or value.dtype != key.dtype
        or value_cache.dtype != key_cache.dtype
        or value.shape != key.shape
        or slot_mapping.shape != (num,)
        or slot_mapping.dtype != torch.int64
        or not _blocks_are_whole(key_cache, heads, dim)
        or not _blocks_are_whole(value_cache, heads, dim)
        or value_cache.shape != key_cache.shape
    ):
        reference.write_kv(key, value, key_cache, value_cache, slot_mapping)
        return
    slot_mapping = slot_mapping.contiguous()
    num_blocks, block_size = key_cache.shape[:2]
    for rows, cache in ((key, key_cache), (value, value_cache)):
        if rows.stride(2) != 1 or rows.stride(1) != dim:
            rows = rows.contiguous()
        _cpu.scatter(
            rows.data_ptr(),
            cache.data_ptr(),
            slot_mapping.data_ptr(),
            num,
            size,
            rows.stride(0),
            block_size,
            cache.stride(0),
            -1,
            num_blocks * block_size,
            dtype,
            cache_dtype,
        )


def _blocks_are_whole(cache: Tensor, heads: int, dim: int) -> bool:
    """Whether each block's slots lie side by side, each with `heads` of `dim` numbers."""
    return cache.shape[2:] == (heads, dim) and cache.stride()[1:] == (heads * dim, dim, 1)
