"""From a step's plan to its tensors."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import torch
from torch import Tensor

from mm_engine.attention.backend import AttentionBackend
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.request import Item
from mm_engine.sequence import UNKNOWN_TOKEN, ScheduledSequence
from mm_engine.worker.transfers import SampledId, to_device


class StepLayout(msgspec.Struct):
    """Where a step's T tokens go, as numbers that another process can be told."""

    positions: list[int]  # [T]
    slots: list[int]  # [T]: where each token's key and value are stored
    block_tables: list[list[int]]  # [S, max_blocks], rows padded with the row's first block
    query_lens: list[int]  # [S]
    context_lens: list[int]  # [S]
    sampled_rows: list[int]  # rows of the step's tokens whose logits are wanted

    def tensors(
        self,
        backend: AttentionBackend,
        kv_caches: list[tuple[Tensor, Tensor]],
        device: torch.device,
    ) -> StepTensors:
        """The same on the device."""
        metadata = AttentionMetadata.of_lens(
            backend,
            kv_caches,
            slot_mapping=to_device(self.slots, device),
            block_tables=to_device(self.block_tables, device, torch.int32),
            query_lens=self.query_lens,
            context_lens=self.context_lens,
        )
        return StepTensors(
            positions=to_device(self.positions, device),
            metadata=metadata,
            sampled_rows=to_device(self.sampled_rows, device),
        )


@dataclass(frozen=True, slots=True)
class StepTensors:
    """A `StepLayout` on the device."""

    positions: Tensor  # [T]
    metadata: AttentionMetadata
    sampled_rows: Tensor  # [R]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """One step's T tokens, sequence after sequence: the plan as numbers."""

    scheduled: list[ScheduledSequence]
    ids: list[int]  # [T]; placeholders hold id 0, their embeddings come from the encoder
    unknown: list[tuple[int, SampledId]]  # (row, id) of ids that the host doesn't know
    layout: StepLayout
    sampled: list[int]  # the indices in `scheduled` of `sampled_rows`; drafts have several
    merges: list[
        tuple[Item, int, int, int]
    ]  # (item, its first row, destination row, number of rows)

    def input_ids(self, device: torch.device) -> Tensor:
        """`[T]` ids."""
        ids = to_device(self.ids, device)
        if self.unknown:
            rows = to_device([row for row, _ in self.unknown], device)
            ids.index_copy_(0, rows, torch.cat([newest.on_device for _, newest in self.unknown]))
        return ids

    def slots(self, index: int) -> list[int]:
        """Where the keys and values of one share are stored."""
        lens = self.layout.query_lens
        return self.layout.slots[sum(lens[:index]) : sum(lens[: index + 1])]


def build_batch(scheduled: list[ScheduledSequence], block_size: int) -> ForwardBatch:
    """Lay out `scheduled` as one flat batch."""
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    merges: list[tuple[Item, int, int, int]] = []
    unknown: list[tuple[int, SampledId]] = []  # by row
    sampled: list[int] = []
    sampled_rows: list[int] = []
    for index, share in enumerate(scheduled):
        sequence, first_row = share.sequence, len(ids)
        ids += sequence.token_ids[share.start : share.end]
        if ids[-1] == UNKNOWN_TOKEN:  # only the newest can be
            ids[-1] = 0
            unknown.append((len(ids) - 1, sequence.newest))
        ids += share.draft_token_ids
        positions += range(share.start, share.start + share.num_rows)
        slots += slots_of(share, block_size)
        for item in sequence.request.items:
            start = max(item.placeholder.offset, share.start)
            end = min(item.placeholder.end, share.end)
            if start < end:
                row = first_row + start - share.start
                ids[row : row + end - start] = [0] * (end - start)
                merges.append((item, start - item.placeholder.offset, row, end - start))
        if share.samples:
            # The last known token's row, and the draft's: what would come behind each of them.
            sampled += [index] * (1 + len(share.draft_token_ids))
            sampled_rows += range(first_row + share.num_new_tokens - 1, len(ids))
    width = max(len(share.sequence.block_table) for share in scheduled)
    tables = [
        table + table[:1] * (width - len(table))
        for table in (share.sequence.block_table for share in scheduled)
    ]

    return ForwardBatch(
        scheduled=scheduled,
        ids=ids,
        unknown=unknown,
        layout=StepLayout(
            positions=positions,
            slots=slots,
            block_tables=tables,
            query_lens=[share.num_rows for share in scheduled],
            context_lens=[share.start + share.num_rows for share in scheduled],
            sampled_rows=sampled_rows,
        ),
        sampled=sampled,
        merges=merges,
    )


def slots_of(share: ScheduledSequence, block_size: int) -> list[int]:
    """Where the keys and values of a share's rows are stored."""
    table = share.sequence.block_table
    return [
        table[position // block_size] * block_size + position % block_size
        for position in range(share.start, share.start + share.num_rows)
    ]
