"""Attention with PyTorch's own operators: sequences of like shape share one call.

A step is cut once into groups, for all layers. Each layer then makes one gather of keys and
values and one `scaled_dot_product_attention` for each group: decodes are one group (or a few, if
their lengths differ by much), fresh prompts need neither gather nor mask.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from mm_engine_kernels import ops, reference
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mm_engine.attention.backend import Attention, Needs
from mm_engine.attention.metadata import AttentionMetadata

#: A call is worth this many (query, key) pairs: below it, padding is cheaper than another call.
CALL_COST = 4096
MAX_PADDING = 1.25  # padded pairs over real ones, from which on a group is cut
MAX_SCORES = 1 << 24  # float32 scores held at once where they are written out: 64 MiB


@dataclass(slots=True)
class Group:
    """Sequences padded to one shape: `num_queries` rows each, over `num_keys` cached tokens."""

    num_sequences: int
    num_queries: int
    num_keys: int
    rows: Tensor | None  # [G * num_queries] rows of the step's tokens; None: all of them, in order
    inverse: Tensor | None  # rows of the padded output that are real, where there is padding
    fresh: bool  # nothing is cached yet: keys and values are the step's own
    blocks: Tensor  # [G * num_blocks] int64
    query_positions: Tensor  # [G, num_queries]
    masks: dict[tuple[int | None, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask `[G, 1, num_queries, num_keys]`."""
        key = (window, dtype)
        if key not in self.masks:
            keys = torch.arange(self.num_keys, device=self.blocks.device)
            positions = self.query_positions[:, :, None]
            hidden = keys > positions
            if window is not None:
                hidden |= keys <= positions - window
            mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            self.masks[key] = mask.masked_fill_(hidden, float("-inf")).unsqueeze(1)
        return self.masks[key]


def cut_groups(query_lens: list[int], context_lens: list[int]) -> list[list[int]]:
    """Indices of sequences by group: neighbours in shape, as long as padding costs little."""
    order = sorted(range(len(query_lens)), key=lambda i: (query_lens[i], context_lens[i]))
    groups: list[list[int]] = []
    real = widest = longest = 0
    for i in order:
        pairs = query_lens[i] * context_lens[i]
        new_widest = max(widest, query_lens[i])
        new_longest = max(longest, context_lens[i])
        if groups:
            padded = (len(groups[-1]) + 1) * new_widest * new_longest
            if padded <= MAX_PADDING * (real + pairs) + CALL_COST:
                groups[-1].append(i)
                real, widest, longest = real + pairs, new_widest, new_longest
                continue
        groups.append([i])
        real, widest, longest = pairs, query_lens[i], context_lens[i]
    return groups


class TorchAttention:
    """The backend that runs wherever PyTorch runs; the others are held to it."""

    name: ClassVar = "torch"
    block_multiple: ClassVar = 1
    captures = False  # it cuts groups by lengths on the host, which a graph doesn't see
    version = ""

    @classmethod
    def unfit(cls, needs: Needs) -> str | None:
        """None: it serves everything."""
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
        # What the cache holds is what is attended to, by fresh prompts as well: else an answer
        # would depend on how its prompt was cut into chunks.
        key = reference.cached(key, key_cache.dtype)
        value = reference.cached(value, value_cache.dtype)
        ops.write_kv(key, value, key_cache, value_cache, metadata.slot_mapping)
        key, value = key.to(query.dtype), value.to(query.dtype)
        groups: list[Group] | None = metadata.plan.get("groups")
        if groups is None:
            groups = metadata.plan["groups"] = plan(metadata, query.device)
        if len(groups) == 1 and groups[0].rows is None:
            return self._attend_group(groups[0], query, key, value, layer, metadata)
        out = torch.empty_like(query)
        for group in groups:
            rows = group.rows
            assert rows is not None
            picked = self._attend_group(group, query[rows], key, value, layer, metadata)
            if group.inverse is None:
                out[rows] = picked
            else:
                out[rows[group.inverse]] = picked[group.inverse]
        return out

    def _attend_group(
        self,
        group: Group,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: Attention,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """`[G * num_queries, H, D]` for the padded queries of one group."""
        num, heads, dim = group.num_sequences, layer.num_heads, layer.head_dim
        kv_heads = layer.num_kv_heads
        window = layer.sliding_window
        if window is not None and window >= group.num_keys:
            window = None
        queries = query.view(num, group.num_queries, heads, dim).transpose(1, 2)
        if group.fresh and window is None and layer.softcap is None:
            if group.rows is not None:
                key, value = key[group.rows], value[group.rows]
            keys = key.view(num, group.num_queries, kv_heads, dim).transpose(1, 2)
            values = value.view(num, group.num_queries, kv_heads, dim).transpose(1, 2)
            out = scaled_dot_product_attention(
                queries, keys, values, is_causal=True, scale=layer.scale, enable_gqa=True
            )
            return out.transpose(1, 2).reshape(-1, heads, dim)
        key_cache, value_cache = metadata.kv_caches[layer.layer_index]

        def gather(cache: Tensor) -> Tensor:
            taken = reference.indexable(cache).flatten(1).index_select(0, group.blocks)
            picked = taken.view(cache.dtype).to(query.dtype)
            # Blocks hold more tokens than are seen; the mask's width says how many count.
            return picked.view(num, -1, kv_heads, dim)[:, : group.num_keys].transpose(1, 2)

        keys, values = gather(key_cache), gather(value_cache)
        if layer.softcap is not None:
            mask = group.mask(window, torch.float32)
            out = capped_attention(queries, keys, values, mask, layer.scale, layer.softcap)
            return out.transpose(1, 2).reshape(-1, heads, dim)
        mask = group.mask(window, query.dtype)
        if group.num_queries == 1:
            # The query heads that share a key head become its queries: no key is read twice.
            queries = queries.reshape(num, kv_heads, heads // kv_heads, dim)
            out = scaled_dot_product_attention(
                queries, keys, values, attn_mask=mask, scale=layer.scale
            )
            return out.reshape(num, heads, dim)
        out = scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, scale=layer.scale, enable_gqa=True
        )
        return out.transpose(1, 2).reshape(-1, heads, dim)


def capped_attention(
    queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float
) -> Tensor:
    """Soft-capped attention of `[G, H, Q, D]` over `[G, K, L, D]`; returns `[G, H, Q, D]`.

    PyTorch's fused attention has no soft cap, so the scores are written out: in float32, for as
    many queries at a time as keep them below `MAX_SCORES`. `mask` is additive, `[G, 1, Q, L]`.
    """
    num, heads, num_queries, _ = queries.shape
    kv_heads, num_keys = keys.shape[1:3]
    rows = max(1, MAX_SCORES // (num * heads * num_keys))
    # The query heads that share a key head become its queries: no key is repeated.
    grouped = queries.unflatten(1, (kv_heads, heads // kv_heads)).float()
    keys, values = keys.float().transpose(-1, -2), values.float()
    pieces = []
    for start in range(0, num_queries, rows):
        piece = grouped[:, :, :, start : start + rows]
        num_rows = piece.shape[3]
        scores = (piece.flatten(2, 3) @ keys).mul_(scale / softcap).tanh_().mul_(softcap)
        scores = scores.unflatten(2, (-1, num_rows))
        scores += mask[:, :, None, start : start + rows]
        picked = scores.softmax(-1).flatten(2, 3) @ values
        pieces.append(picked.unflatten(2, (-1, num_rows)).flatten(1, 2))
    return torch.cat(pieces, dim=2).to(queries.dtype)


def plan(metadata: AttentionMetadata, device: torch.device) -> list[Group]:
    """Cut a step into groups and make each one's indices: once a step, not once a layer."""
    query_lens, context_lens = metadata.query_lens, metadata.context_lens
    starts = torch.tensor([0, *query_lens]).cumsum(0).tolist()
    cut = cut_groups(query_lens, context_lens)
    block_size = metadata.kv_caches[0][0].shape[1]
    groups = []
    for members in cut:
        num_queries = max(query_lens[i] for i in members)
        num_keys = max(context_lens[i] for i in members)
        lens = torch.tensor([query_lens[i] for i in members], device=device)
        contexts = torch.tensor([context_lens[i] for i in members], device=device)
        first = torch.tensor([starts[i] for i in members], device=device)
        column = torch.arange(num_queries, device=device)
        # Padding repeats a sequence's last row, so that every row stays a valid one.
        offsets = torch.minimum(column[None, :], lens[:, None] - 1)
        ragged = any(query_lens[i] != num_queries for i in members)
        whole = len(cut) == 1 and not ragged and members == list(range(len(query_lens)))
        num_blocks = -(-num_keys // block_size)
        tables = metadata.block_tables[torch.tensor(members, device=device)]
        groups.append(
            Group(
                num_sequences=len(members),
                num_queries=num_queries,
                num_keys=num_keys,
                rows=None if whole else (first[:, None] + offsets).flatten(),
                inverse=(column[None, :] < lens[:, None]).flatten() if ragged else None,
                fresh=all(query_lens[i] == context_lens[i] for i in members),
                blocks=tables[:, :num_blocks].flatten(),
                query_positions=contexts[:, None] - lens[:, None] + offsets,
            )
        )
    return groups
