"""Attention with our own Triton kernels, which take blocks and heads of any size."""

from __future__ import annotations

import os
from typing import ClassVar

import torch
from torch import Tensor

from mm_engine.attention.backend import Attention, Needs
from mm_engine.attention.importing import import_fault, version_of
from mm_engine.attention.metadata import AttentionMetadata

INSTALL = "pip install triton"


class TritonAttention:
    """`paged_decode` for a step of decodes, `paged_prefill` for all others.

    On a CPU it runs under Triton's interpreter, in Python: for tests.
    """

    name: ClassVar = "triton"
    block_multiple: ClassVar = 1
    captures = True

    def __init__(self) -> None:
        from mm_engine_kernels.triton.paged_decode import paged_decode
        from mm_engine_kernels.triton.paged_prefill import paged_prefill
        from mm_engine_kernels.triton.write_kv import write_kv

        self.version = version_of("triton")
        self._decode, self._prefill, self._write_kv = paged_decode, paged_prefill, write_kv

    @classmethod
    def unfit(cls, needs: Needs) -> str | None:
        """See `AttentionBackend.unfit`."""
        if needs.capability is not None and needs.capability < (8, 0):
            major, minor = needs.capability
            return f"needs a card of compute capability 8.0 or newer, not {major}.{minor}"
        return triton_fault(needs.device)

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
        self._write_kv(key, value, key_cache, value_cache, metadata.slot_mapping)
        if metadata.max_query_len == 1:
            return self._decode(
                query,
                key_cache,
                value_cache,
                metadata.block_tables,
                metadata.contexts,
                layer.scale,
                layer.sliding_window,
                layer.softcap,
                max_context_len=metadata.max_context_len,
            )
        return self._prefill(
            query,
            key_cache,
            value_cache,
            metadata.block_tables,
            metadata.query_starts,
            metadata.contexts,
            layer.scale,
            layer.sliding_window,
            layer.softcap,
            max_query_len=metadata.max_query_len,
        )


def triton_fault(device: torch.device) -> str | None:
    """Why our Triton kernels can't run on `device`, as words behind the name; None: they can."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return "needs a CUDA card (or TRITON_INTERPRET=1, its interpreter, which is slow)"
    return import_fault("triton", "triton", INSTALL)
