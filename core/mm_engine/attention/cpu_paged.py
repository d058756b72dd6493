"""Attention on a CPU with our own C++ kernels: one call a layer for a step of any kind."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import torch
from mm_engine_kernels import ops
from torch import Tensor

from mm_engine.attention.backend import Attention, Needs
from mm_engine.attention.metadata import AttentionMetadata

if TYPE_CHECKING:
    from mm_engine_kernels.cpu.paged_attention import Plan

DTYPES = (torch.float32, torch.bfloat16)


class CpuAttention:
    """Decodes, chunks and fresh prompts of a step are one job for all threads."""

    name: ClassVar = "cpu"
    block_multiple: ClassVar = 1
    captures = True

    def __init__(self) -> None:
        from mm_engine_kernels.cpu import extension, paged_attention

        self.version = extension.isa()  # the instruction set
        self._kernels = paged_attention

    @classmethod
    def unfit(cls, needs: Needs) -> str | None:
        """See `AttentionBackend.unfit`."""
        if needs.device.type != "cpu":
            return "runs on a CPU only"
        if needs.dtype not in DTYPES:
            return f"takes bfloat16 and float32, not {_named(needs.dtype)}: --dtype bfloat16"
        if needs.kv_dtype != needs.dtype:
            return f"can't read a KV cache of {_named(needs.kv_dtype)}"
        try:
            ops.LOADERS["cpp"]("cpu")
        except ops.Unavailable as error:
            return f"can't run: {error}"
        return None

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
        plan: Plan | None = metadata.plan.get("cpu")
        if plan is None:
            plan = metadata.plan["cpu"] = self._kernels.Plan.of(
                metadata.block_tables,
                metadata.query_starts,
                metadata.contexts,
                metadata.query_lens,
                metadata.context_lens,
            )
        return self._kernels.attend(
            query, key_cache, value_cache, plan, layer.scale, layer.sliding_window, layer.softcap
        )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
