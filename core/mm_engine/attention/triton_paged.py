"""Attention with our own Triton kernels, which take blocks and heads of any size."""

from __future__ import annotations

from typing import ClassVar

from mm_engine_kernels import ops
from torch import Tensor

from mm_engine.attention.backend import Attention, Needs
from mm_engine.attention.metadata import AttentionMetadata


class TritonAttention:
    """`paged_decode` for a step of decodes, `paged_prefill` for all others.

    On a CPU it runs under Triton's interpreter, in Python: for tests.
    """

    name: ClassVar = "triton"
    block_multiple: ClassVar = 1
    captures = True

    def __init__(self) -> None:
        self.version, self._kernels = ops.LOADERS["triton"]("cuda")

    @classmethod
    def unfit(cls, needs: Needs) -> str | None:
        """See `AttentionBackend.unfit`."""
        if needs.capability is not None and needs.capability < (8, 0):
            major, minor = needs.capability
            return f"needs a card of compute capability 8.0 or newer, not {major}.{minor}"
        return triton_fault(needs.device.type)

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
        self._kernels.write_kv(key, value, key_cache, value_cache, metadata.slot_mapping)
        if metadata.max_query_len == 1:
            return self._kernels.paged_decode(
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
        return self._kernels.paged_prefill(
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


def triton_fault(device_type: str) -> str | None:
    """Why our kernels can't run on such a device, as words behind "triton"; None: they can."""
    try:
        ops.LOADERS["triton"](device_type)
    except ops.Unavailable as error:
        return str(error).removeprefix("triton ")
    return None
