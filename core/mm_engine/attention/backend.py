"""The one interface of attention backends, and the layer through which models reach it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn

from mm_engine.attention.metadata import AttentionMetadata


class AttentionBackend(Protocol):
    """Computes attention for a whole step in few calls; chosen once, at startup."""

    name: str

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: Attention,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Store `key` and `value` `[T, K, D]`, then attend `query` `[T, H, D]`; `[T, H, D]`.

        The meaning is `mm_engine_kernels.reference.write_kv` and `paged_attention`.
        """
        ...


class Attention(nn.Module):
    """One layer's causal self-attention; it has no weights, only a place in the KV cache.

    `scale` multiplies the scores (None: head_dim ** -0.5), `softcap` then bends them to stay below
    it (softcap * tanh(score / softcap)). With `sliding_window` w a token sees itself and the w - 1
    before it.
    """

    def __init__(
        self,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        *,
        scale: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.scale = head_dim**-0.5 if scale is None else scale
        self.sliding_window = sliding_window
        self.softcap = softcap
        self.layer_index = -1  # the worker numbers the layers when it allocates the cache

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """`[T, H, D]` queries and `[T, K, D]` keys and values to `[T, H, D]`."""
        return metadata.backend.attend(query, key, value, self, metadata)
