"""From a step's plan to its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm_engine.attention.backend import AttentionBackend
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.request import Item
from mm_engine.sequence import ScheduledSequence


@dataclass(slots=True)
class ForwardBatch:
    """One step's tensors: T tokens, sequence after sequence."""

    scheduled: list[ScheduledSequence]
    input_ids: Tensor  # [T]; placeholders hold id 0, their embeddings come from the encoder
    positions: Tensor  # [T]
    metadata: AttentionMetadata
    sampled_rows: Tensor  # rows of the step's tokens whose logits are wanted
    sampled: list[int]  # the indices in `scheduled` that these rows belong to
    merges: list[
        tuple[Item, int, int, int]
    ]  # (item, its first row, destination row, number of rows)


def build_batch(
    scheduled: list[ScheduledSequence],
    backend: AttentionBackend,
    kv_caches: list[tuple[Tensor, Tensor]],
    block_size: int,
    device: torch.device,
) -> ForwardBatch:
    """Lay out `scheduled` as one flat batch."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    merges: list[tuple[Item, int, int, int]] = []
    sampled: list[int] = []
    sampled_rows: list[int] = []
    for index, share in enumerate(scheduled):
        sequence, first_row = share.sequence, len(ids)
        ids += sequence.token_ids[share.start : share.end]
        positions += range(share.start, share.end)
        table = sequence.block_table
        slots += [
            table[position // block_size] * block_size + position % block_size
            for position in range(share.start, share.end)
        ]
        for item in sequence.request.items:
            start = max(item.placeholder.offset, share.start)
            end = min(item.placeholder.end, share.end)
            if start < end:
                row = first_row + start - share.start
                ids[row : row + end - start] = [0] * (end - start)
                merges.append((item, start - item.placeholder.offset, row, end - start))
        if share.samples:
            sampled.append(index)
            sampled_rows.append(len(ids) - 1)
    width = max(len(share.sequence.block_table) for share in scheduled)
    tables = [
        table + table[:1] * (width - len(table))
        for table in (share.sequence.block_table for share in scheduled)
    ]

    def tensor(values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)

    metadata = AttentionMetadata(
        backend=backend,
        kv_caches=kv_caches,
        slot_mapping=tensor(slots),
        block_tables=tensor(tables),
        query_lens=[share.num_new_tokens for share in scheduled],
        context_lens=[share.end for share in scheduled],
    )
    return ForwardBatch(
        scheduled=scheduled,
        input_ids=tensor(ids),
        positions=tensor(positions),
        metadata=metadata,
        sampled_rows=tensor(sampled_rows),
        sampled=sampled,
        merges=merges,
    )
