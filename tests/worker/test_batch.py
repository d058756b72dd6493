"""A step's plan becomes one flat batch: ids, positions, slots, merges and rows to sample."""

from __future__ import annotations

import pytest
import torch

from mm_engine.attention.torch_sdpa import TorchAttention
from mm_engine.sequence import ScheduledSequence, Sequence
from mm_engine.worker.batch import ForwardBatch, build_batch
from sequences import make_item, make_sequence

BLOCK = 4
IMAGE = 99  # the placeholder's token id


def build(*shares: tuple[Sequence, int]) -> ForwardBatch:
    scheduled = [ScheduledSequence(sequence, num) for sequence, num in shares]
    return build_batch(scheduled, BLOCK)


def placed(sequence: Sequence, computed: int, table: list[int]) -> Sequence:
    sequence.num_computed_tokens, sequence.block_table = computed, table
    return sequence


def test_prefill_chunk_and_decode_lie_side_by_side() -> None:
    prefill = placed(make_sequence((11, 12, 13, 14, 15, 16, 17)), 2, [7, 3])
    decode = placed(make_sequence((21, 22), (23, 24, 25, 26)), 5, [0, 9, 5])
    fresh = placed(make_sequence((31, 32)), 0, [4])
    batch = build((prefill, 3), (decode, 1), (fresh, 2))
    assert batch.input_ids(torch.device("cpu")).tolist() == [13, 14, 15, 26, 31, 32]
    assert batch.layout.positions == [2, 3, 4, 5, 0, 1]
    meta = batch.layout.tensors(TorchAttention(), [], torch.device("cpu")).metadata
    assert meta.slot_mapping.tolist() == [7 * 4 + 2, 7 * 4 + 3, 3 * 4, 9 * 4 + 1, 4 * 4, 4 * 4 + 1]
    assert meta.query_lens == [3, 1, 2]
    assert meta.context_lens == [5, 6, 2]
    # Rows are padded with a block of the sequence's own: nobody else's is read.
    assert meta.block_tables.tolist() == [[7, 3, 7], [0, 9, 5], [4, 4, 4]]


def test_rows_are_sampled_where_a_share_reaches_the_last_token() -> None:
    unfinished = placed(make_sequence((1, 2, 3, 4, 5)), 0, [0, 1])
    last_chunk = placed(make_sequence((1, 2, 3, 4, 5)), 3, [2, 3])
    decode = placed(make_sequence((1,), (2,)), 1, [4])
    batch = build((unfinished, 4), (last_chunk, 2), (decode, 1))
    assert batch.sampled == [1, 2]
    assert batch.layout.sampled_rows == [5, 6]


def test_a_recomputed_sequence_is_sampled_at_its_last_output_token_only() -> None:
    preempted = placed(make_sequence((1, 2), (3, 4, 5)), 0, [0, 1])
    assert build((preempted, 2)).sampled == []
    assert build((preempted, 5)).layout.sampled_rows == [4]


def test_a_draft_lies_behind_its_sequence_and_every_row_of_it_is_sampled() -> None:
    decode = placed(make_sequence((21, 22), (23, 24, 25, 26)), 5, [0, 9, 5])
    prefill = placed(make_sequence((11, 12, 13)), 0, [7])
    shares = [
        ScheduledSequence(decode, 1, draft_token_ids=(27, 28, 29)),
        ScheduledSequence(prefill, 3),
    ]
    batch = build_batch(shares, BLOCK)
    assert batch.input_ids(torch.device("cpu")).tolist() == [26, 27, 28, 29, 11, 12, 13]
    assert batch.layout.positions == [5, 6, 7, 8, 0, 1, 2]
    slots = [9 * 4 + 1, 9 * 4 + 2, 9 * 4 + 3, 5 * 4, 7 * 4, 7 * 4 + 1, 7 * 4 + 2]
    assert batch.layout.slots == slots
    assert batch.layout.query_lens == [4, 3]
    assert batch.layout.context_lens == [9, 3]
    assert batch.sampled == [0, 0, 0, 0, 1]
    assert batch.layout.sampled_rows == [0, 1, 2, 3, 6]
    assert decode.token_ids == [21, 22, 23, 24, 25, 26]


PROMPT = (1, 2, IMAGE, IMAGE, IMAGE, IMAGE, 3, IMAGE, IMAGE, 4)
FIRST, SECOND = make_item("a", 2, 4), make_item("b", 7, 2, 1)


@pytest.mark.parametrize(
    ("start", "num", "merges"),
    [
        pytest.param(0, 2, [], id="before"),
        pytest.param(0, 10, [("a", 0, 2, 4), ("b", 0, 7, 2)], id="whole"),
        pytest.param(0, 4, [("a", 0, 2, 2)], id="cut-at-the-end"),
        pytest.param(4, 2, [("a", 2, 0, 2)], id="rest-up-to-the-edge"),
        pytest.param(3, 2, [("a", 1, 0, 2)], id="inside"),
        pytest.param(4, 4, [("a", 2, 0, 2), ("b", 0, 3, 1)], id="rest-and-next"),
        pytest.param(6, 1, [], id="between"),
        pytest.param(9, 1, [], id="after"),
    ],
)
def test_a_chunk_merges_the_rows_of_images_that_it_covers(
    start: int, num: int, merges: list[tuple[str, int, int, int]]
) -> None:
    other = placed(make_sequence((51, 52, 53)), 0, [8])
    sequence = placed(make_sequence(PROMPT, items=(FIRST, SECOND)), start, [0, 1, 2])
    batch = build((other, 3), (sequence, num))  # rows of the step are counted from its start
    expected = [(key, first, row + 3, count) for key, first, row, count in merges]
    got = [(item.content_key, first, row, count) for item, first, row, count in batch.merges]
    assert got == expected
    ids = batch.input_ids(torch.device("cpu")).tolist()
    assert ids[:3] == [51, 52, 53]
    assert ids[3:] == [0 if t == IMAGE else t for t in PROMPT[start : start + num]]
    assert sequence.token_ids == list(PROMPT)
