"""Attention over the paged KV cache for a whole step, decodes and prefills in one call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm_engine_kernels import _cpu, reference
from mm_engine_kernels.cpu.extension import DTYPES


@dataclass(slots=True)
class Plan:
    """What the layers of a step have in common, in the form that the kernel takes."""

    block_tables: Tensor  # [S, max_blocks] int32 or int64, rows of numbers side by side
    query_starts: Tensor  # [S + 1] int32
    contexts: Tensor  # [S] int32
    num_pairs: int  # of a query and a key, over all sequences

    @classmethod
    def of(
        cls,
        block_tables: Tensor,
        query_starts: Tensor,
        contexts: Tensor,
        query_lens: list[int],
        context_lens: list[int],
    ) -> Plan:
        """Of a step's tensors, which are `AttentionMetadata`'s, and of the same on the host."""
        if block_tables.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"block tables must be int32 or int64, not {block_tables.dtype}.")
        if block_tables.stride(1) != 1 and block_tables.shape[1] != 1:
            block_tables = block_tables.contiguous()
        pairs = sum(num * length for num, length in zip(query_lens, context_lens, strict=True))
        return cls(
            block_tables,
            query_starts.to(torch.int32).contiguous(),
            contexts.to(torch.int32).contiguous(),
            pairs,
        )

    @classmethod
    def of_lens(cls, block_tables: Tensor, query_lens: list[int], context_lens: list[int]) -> Plan:
        """Of lengths alone."""
        starts = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        contexts = torch.tensor(context_lens, dtype=torch.int32)
        return cls.of(block_tables, starts, contexts, query_lens, context_lens)


def takes(query: Tensor, key_cache: Tensor, value_cache: Tensor) -> bool:
    """Whether the kernel computes on these dtypes."""
    return query.dtype in DTYPES and query.dtype == key_cache.dtype == value_cache.dtype


def attend(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    plan: Plan,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`reference.paged_attention` of a step's `plan`; the dtypes are such as it `takes`.

    `out` is contiguous; rows past the last sequence's stay as they are.
    """
    rows, heads, dim = query.shape
    if query.stride(2) != 1 and dim != 1:
        query = query.contiguous()
    if (key_cache.stride(3) != 1 or value_cache.stride(3) != 1) and dim != 1:
        key_cache, value_cache = key_cache.contiguous(), value_cache.contiguous()
    if out is None:
        out = torch.empty((rows, heads, dim), dtype=query.dtype)
    tables = plan.block_tables
    key_strides, value_strides = key_cache.stride(), value_cache.stride()
    _cpu.attention(
        query.data_ptr(),
        query.stride(0),
        query.stride(1),
        (key_cache.data_ptr(), key_strides[0], key_strides[1], key_strides[2]),
        (value_cache.data_ptr(), value_strides[0], value_strides[1], value_strides[2]),
        tables.data_ptr(),
        tables.stride(0),
        tables.dtype is torch.int64,
        key_cache.shape[1],
        plan.query_starts.data_ptr(),
        plan.contexts.data_ptr(),
        out.data_ptr(),
        plan.contexts.shape[0],
        heads,
        key_cache.shape[2],
        dim,
        sliding_window or 0,
        scale,
        softcap or 0.0,
        True,
        DTYPES[query.dtype],
        plan.num_pairs * heads * dim * 2,
    )
    return out


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`reference.paged_attention`."""
    if not takes(query, key_cache, value_cache):
        return reference.paged_attention(
            query,
            key_cache,
            value_cache,
            block_tables,
            query_lens,
            context_lens,
            scale,
            sliding_window,
            softcap,
        )
    room = block_tables.shape[1] * key_cache.shape[1] if block_tables.numel() else 0
    if sum(query_lens) != query.shape[0] or max(context_lens, default=0) > room:
        raise ValueError(
            f"{query.shape[0]} queries and blocks for {room} tokens don't fit sequences of "
            f"{query_lens} queries and {context_lens} tokens."
        )
    plan = Plan.of_lens(block_tables, query_lens, context_lens)
    return attend(query, key_cache, value_cache, plan, scale, sliding_window, softcap)
