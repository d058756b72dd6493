"""What a step tells every attention layer: where the tokens go and what each sequence sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from mm_engine.attention.backend import AttentionBackend


@dataclass(slots=True)
class AttentionMetadata:
    """One step's layout over the paged KV cache, shared by all layers.

    T tokens lie sequence after sequence; sequence s has `query_lens[s]` of them, the last of its
    `context_lens[s]` tokens. `kv_caches[layer]` is a pair of `[num_blocks, block_size, K, D]`.
    """

    backend: AttentionBackend
    kv_caches: list[tuple[Tensor, Tensor]]
    slot_mapping: Tensor  # [T] int64: where each token's key and value are stored
    block_tables: Tensor  # [S, max_blocks] int64, rows padded with the row's first block
    query_lens: list[int]
    context_lens: list[int]
    plan: dict[Any, Any] = field(default_factory=dict)  # owner: the backend
