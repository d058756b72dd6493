"""Attention with PyTorch's own `varlen_attn`, over our cache by block table.

PyTorch carries FlashAttention-2 for it. With a paged cache it must not split a context among
processors: where it chose to by itself, torch 2.13 has given wrong rows.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

from mm_engine_kernels import ops
from torch import Tensor

from mm_engine.attention.backend import Attention, Needs
from mm_engine.attention.flash_attn import PAGE, context_starts, flash_limits
from mm_engine.attention.importing import torch_version
from mm_engine.attention.metadata import AttentionMetadata


class VarlenAttention:
    """`torch.nn.attention.varlen.varlen_attn` for every step."""

    name: ClassVar = "varlen"
    block_multiple: ClassVar = PAGE
    captures = False  # it makes a tensor once a step, which a replayed graph would not

    def __init__(self) -> None:
        from torch.nn.attention.varlen import varlen_attn

        self._varlen = varlen_attn
        self.version = f"of torch {torch_version()}"

    @classmethod
    def unfit(cls, needs: Needs) -> str | None:
        """See `AttentionBackend.unfit`."""
        if needs.capability is None:
            return "needs a CUDA card"
        if needs.capability < (8, 0):
            major, minor = needs.capability
            return f"needs a card of compute capability 8.0 or newer, not {major}.{minor}"
        if not {"seqused_k", "block_table", "num_splits", "enable_gqa"} <= set(_parameters()):
            return f"of torch {torch_version()} reads no paged cache: install torch 2.13 or newer"
        if needs.has_softcap:
            return "has no soft cap, which the model needs"
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
        # Both ends of its window are inclusive; (-1, 0) is causal without a window.
        left = -1 if layer.sliding_window is None else layer.sliding_window - 1
        out = self._varlen(
            query,
            key_cache,
            value_cache,
            metadata.query_starts,
            context_starts(metadata),
            metadata.max_query_len,
            metadata.max_context_len,
            scale=layer.scale,
            window_size=(left, 0),
            enable_gqa=layer.num_heads != layer.num_kv_heads,
            seqused_k=metadata.contexts,
            block_table=metadata.block_tables,
            num_splits=1,
        )
        assert isinstance(out, Tensor)  # a pair only where more is asked for
        return out


def _parameters() -> dict[str, Any]:
    """The parameters of `varlen_attn`; none where PyTorch has no such function."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return {}
    return dict(inspect.signature(varlen_attn).parameters)
