"""What a step tells every attention layer: where the tokens go and what each sequence sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mm_engine.attention.backend import AttentionBackend


@dataclass(slots=True)
class AttentionMetadata:
    """One step's layout over the paged KV cache, shared by all layers.

    T tokens lie sequence after sequence; the last of a sequence's tokens are the step's own.
    `kv_caches[layer]` is a pair of `[num_blocks, block_size, K, D]`. Backends that capture
    read the tensors and the two maxima and nothing else, so that a graph may be replayed with
    other numbers in the same tensors; the maxima are then upper bounds, and a row that is only
    padding has slot -1 and context 0.
    """

    backend: AttentionBackend
    kv_caches: list[tuple[Tensor, Tensor]]
    slot_mapping: Tensor  # [T] int64: where each token's key and value are stored
    block_tables: Tensor  # [S, max_blocks] int32, rows padded with the row's first block
    query_starts: Tensor  # [S + 1] int32: each sequence's first row, and T
    contexts: Tensor  # [S] int32: how many tokens each sequence has, the step's own included
    max_query_len: int
    max_context_len: int
    #: The same on the host, where it is known: the step's own tokens, and all tokens.
    query_lens: list[int] = field(default_factory=list)
    context_lens: list[int] = field(default_factory=list)
    plan: dict[Any, Any] = field(default_factory=dict)  # owner: the backend

    @classmethod
    def of_lens(
        cls,
        backend: AttentionBackend,
        kv_caches: list[tuple[Tensor, Tensor]],
        slot_mapping: Tensor,
        block_tables: Tensor,
        query_lens: list[int],
        context_lens: list[int],
    ) -> AttentionMetadata:
        """Of a step whose sequences have these lengths; the tensors go where `slot_mapping` is."""
        starts = [0]
        for num in query_lens:
            starts.append(starts[-1] + num)

        device = slot_mapping.device

        def tensor(values: list[int]) -> Tensor:
            # Pinned, or the copy would wait for what the device is doing.
            pinned = device.type == "cuda"
            on_host = torch.tensor(values, dtype=torch.int32, pin_memory=pinned)
            return on_host.to(device, non_blocking=True)

        return cls(
            backend=backend,
            kv_caches=kv_caches,
            slot_mapping=slot_mapping,
            block_tables=block_tables,
            query_starts=tensor(starts),
            contexts=tensor(context_lens),
            max_query_len=max(query_lens),
            max_context_len=max(context_lens),
            query_lens=query_lens,
            context_lens=context_lens,
        )
