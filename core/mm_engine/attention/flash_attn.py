"""Attention with the flash-attn package (FlashAttention-2), which reads our cache by block table.

Its signatures are those of flash-attn 2.6 and later. The package is imported when it is asked for.
"""

from __future__ import annotations

import inspect
from typing import ClassVar

import torch
from mm_engine_kernels import ops
from torch import Tensor
from torch.nn.functional import pad

from mm_engine.attention.backend import HALVES, Attention, Needs
from mm_engine.attention.importing import import_fault, version_of
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.attention.triton_paged import triton_fault

PAGE = 256  # tokens: its paged kernels take blocks of multiples of this
#: Its setup imports torch, and must find the one that it is built for.
INSTALL = "pip install --no-build-isolation 'mm-engine[cuda]'"


class FlashAttention:
    """`flash_attn_with_kvcache` for a step of decodes, `flash_attn_varlen_func` for all others."""

    name: ClassVar = "flash-attn"
    block_multiple: ClassVar = PAGE

    def __init__(self) -> None:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        self.version = version_of("flash-attn")
        self._varlen, self._with_kvcache = flash_attn_varlen_func, flash_attn_with_kvcache
        # The reference's write, which runs without Triton, asks the device about rows of padding.
        self.captures = triton_fault("cuda") is None

    @classmethod
    def unfit(cls, needs: Needs) -> str | None:
        """See `AttentionBackend.unfit`."""
        if needs.capability is None:
            return "needs a CUDA card"
        if needs.capability < (8, 0):
            major, minor = needs.capability
            return f"needs a card of compute capability 8.0 or newer, not {major}.{minor}"
        if (fault := import_fault("flash_attn", "flash-attn", INSTALL)) is not None:
            return fault
        if (fault := _too_old()) is not None:
            return fault
        return flash_limits(needs)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: Attention,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """See `AttentionBackend.attend`."""
        key_cache, value_cache = metadata.kv_caches[layer.layer_index]
        ops.write_kv(key, value, key_cache, value_cache, metadata.slot_mapping)
        # Both ends of its window are inclusive, and its 0 is no cap.
        window = (-1, -1) if layer.sliding_window is None else (layer.sliding_window - 1, 0)
        if metadata.max_query_len == 1:
            out = self._with_kvcache(
                query.unsqueeze(1),
                key_cache,
                value_cache,
                cache_seqlens=metadata.contexts,
                block_table=metadata.block_tables,
                softmax_scale=layer.scale,
                causal=True,
                window_size=window,
                softcap=layer.softcap or 0.0,
            )
            return out.squeeze(1)
        return self._varlen(
            query,
            key_cache,
            value_cache,
            cu_seqlens_q=metadata.query_starts,
            cu_seqlens_k=context_starts(metadata),
            max_seqlen_q=metadata.max_query_len,
            max_seqlen_k=metadata.max_context_len,
            softmax_scale=layer.scale,
            causal=True,
            window_size=window,
            softcap=layer.softcap or 0.0,
            block_table=metadata.block_tables,
        )


def flash_limits(needs: Needs) -> str | None:
    """What FlashAttention-2's paged kernels don't take, as words behind a name; None: nothing."""
    if needs.dtype not in HALVES:
        return f"takes bfloat16 and float16, not {_name(needs.dtype)}: --dtype bfloat16"
    if needs.kv_dtype != needs.dtype:
        return f"can't read a KV cache of {_name(needs.kv_dtype)}"
    if needs.odd_head_sizes:
        return f"takes head sizes up to 256 in multiples of 8, not {needs.odd_head_sizes[-1]}"
    return None


def context_starts(metadata: AttentionMetadata) -> Tensor:
    """`[S + 1]` int32: where each sequence's tokens would begin if all lay in a row."""
    starts: Tensor | None = metadata.plan.get("context_starts")
    if starts is None:
        starts = pad(metadata.contexts.cumsum(0, dtype=torch.int32), (1, 0))
        metadata.plan["context_starts"] = starts
    return starts


def _too_old() -> str | None:
    """Why the installed package is no FlashAttention-2 with what we pass; None: it is one."""
    import flash_attn

    for name in ("flash_attn_varlen_func", "flash_attn_with_kvcache"):
        function = getattr(flash_attn, name, None)
        known = () if function is None else inspect.signature(function).parameters
        if not {"block_table", "softcap"} <= set(known):
            version = f"{version_of('flash-attn')} ".lstrip()
            return f"{version}has no paged {name} with a soft cap: install flash-attn 2.6 or newer"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
