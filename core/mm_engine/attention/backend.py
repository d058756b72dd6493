"""The one interface of attention backends, and the layer through which models reach it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor, nn

from mm_engine.attention.metadata import AttentionMetadata

HALVES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a backend is asked to serve: a model's attention layers on one device."""

    layers: Sequence[Attention]
    device: torch.device
    dtype: torch.dtype
    kv_dtype: torch.dtype  # of the cache
    block_size: int = 16  # tokens, before it is rounded up to what the backend takes
    capability: tuple[int, int] | None = None  # of the CUDA card

    @property
    def odd_head_sizes(self) -> list[int]:
        """Head sizes that FlashAttention's kernels don't take."""
        sizes = {layer.head_dim for layer in self.layers}
        return sorted(size for size in sizes if size > 256 or size % 8)

    @property
    def has_softcap(self) -> bool:
        """Whether a layer bends its scores."""
        return any(layer.softcap is not None for layer in self.layers)


def block_size_of(backend: type[AttentionBackend] | AttentionBackend, wanted: int) -> int:
    """Tokens in a block: `wanted`, rounded up to what `backend` takes."""
    return -(-wanted // backend.block_multiple) * backend.block_multiple


class AttentionBackend(Protocol):
    """Computes attention for a whole step in few calls; chosen once, at startup.

    A class can be asked whether it is `unfit` without being made; making one loads what it needs.
    """

    name: ClassVar[str]
    block_multiple: ClassVar[int]  # tokens: it takes blocks of multiples of this
    captures: bool  # whether a step of decodes may be captured in a graph and replayed
    version: str  # of what it runs on, for the log; may be empty

    @classmethod
    def unfit(cls, needs: Needs) -> str | None:
        """Why it can't serve these needs, as words behind its name, with a remedy; None: it can.

        Nothing is computed to find out, but what it needs is imported.
        """
        ...

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
