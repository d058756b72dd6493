"""Attention without a mask, as an encoder's: every query sees every key."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_engine_kernels import _cpu, reference
from mm_engine_kernels.cpu.extension import DTYPES


def full_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`reference.full_attention`."""
    if not query.dtype == key.dtype == value.dtype or query.dtype not in DTYPES:
        return reference.full_attention(query, key, value, scale)
    num, length, heads, dim = query.shape
    keys, kv_heads = key.shape[1:3]
    if (
        key.shape != value.shape
        or key.shape[0] != num
        or key.shape[3] != dim
        or not keys
        or not kv_heads
        or heads % kv_heads
    ):
        raise ValueError(
            f"queries {list(query.shape)}, keys {list(key.shape)} and values "
            f"{list(value.shape)} don't fit."
        )
    if query.stride(3) != 1 or (num > 1 and query.stride(0) != length * query.stride(1)):
        query = query.contiguous()
    if key.stride(3) != 1 or value.stride(3) != 1:
        key, value = key.contiguous(), value.contiguous()
    out = torch.empty((num, length, heads, dim), dtype=query.dtype)
    # To the kernel each of the batch is a sequence whose cache is one block.
    tables = torch.arange(num, dtype=torch.int32)
    starts = torch.arange(num + 1, dtype=torch.int32) * length
    contexts = torch.full((num,), keys, dtype=torch.int32)
    _cpu.attention(
        query.data_ptr(),
        query.stride(1),
        query.stride(2),
        (key.data_ptr(), key.stride(0), key.stride(1), key.stride(2)),
        (value.data_ptr(), value.stride(0), value.stride(1), value.stride(2)),
        tables.data_ptr(),
        1,
        False,
        keys,
        starts.data_ptr(),
        contexts.data_ptr(),
        out.data_ptr(),
        num,
        heads,
        kv_heads,
        dim,
        0,
        scale,
        0.0,
        False,
        DTYPES[query.dtype],
        num * length * keys * heads * dim * 2,
    )
    return out
