"""A small deterministic stand-in for the device, so that the engine's decisions can be tested.

`CheckingRunner` computes no model: the next token is a hash of everything before it. It keeps
what was written to each slot of the cache, and holds every step to what the engine promises.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from mm_engine.config import EngineConfig
from mm_engine.engine.engine import Engine
from mm_engine.outputs import ErrorInfo
from mm_engine.request import Request
from mm_engine.sequence import (
    UNKNOWN_TOKEN,
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    StepResult,
)

PLACEHOLDER_ID = 299
EOS_ID = 298


def content(request: Request) -> list[Any]:
    """What stands at each position of a prompt: a token id, or a row of an item's features."""
    rows: list[Any] = list(request.prompt_token_ids)
    for item in request.items:
        for row in range(item.placeholder.length):
            rows[item.placeholder.offset + row] = (item.content_key, row)
    return rows


def next_token(rows: list[Any], index: int, vocab: int) -> int:
    """The pretended model: a hash of all rows before, one of `vocab` letters or the end."""
    digest = hashlib.sha256(repr((rows, index)).encode()).digest()
    choice = int.from_bytes(digest[:4], "big") % (vocab + 1)
    return EOS_ID if choice == vocab else 65 + choice


def all_pasts(salt: str, rows: list[Any]) -> list[bytes]:
    """For each position a digest of all up to it: keys and values of layers depend on just that."""
    past, pasts = salt.encode(), list[bytes]()
    for row in rows:
        past = hashlib.sha256(past + repr(row).encode()).digest()
        pasts.append(past)
    return pasts


def expected_tokens(request: Request, index: int, vocab: int) -> list[int]:
    """What completion `index` must be, computed without an engine."""
    params, rows, output = request.sampling_params, content(request), list[int]()
    assert params.max_tokens is not None
    while len(output) < params.max_tokens:
        output.append(next_token(rows + output, index, vocab))
        if output[-1] in request.eos_token_ids and not params.ignore_eos:
            break
    return output


class LaunchedStep:
    """A step that a `CheckingRunner` computed, whose result is its secret until it is asked."""

    def __init__(
        self,
        runner: CheckingRunner,
        number: int,
        shares: tuple[ScheduledSequence, ...],
        result: StepResult,
    ) -> None:
        self.runner, self.number, self._result = runner, number, result
        self.sampling = [share.sequence for share in shares if share.samples]
        self.failed = any(token.error not in (None, runner.late) for token in result.tokens)

    def result(self) -> StepResult:
        del self.runner.writes[self.number]
        self.runner.events.append(f"result {self.number}")
        self.runner.num_wasted += sum(
            sequence.finished and sequence.finish_reason != "abort" for sequence in self.sampling
        )
        return self._result


class CheckingRunner:
    """Runs steps by hashing, and asserts that each step is one that a device could run.

    What a step samples is known to those launched after it, and is told with its result.
    """

    def __init__(self, config: EngineConfig, num_blocks: int, max_rows: int, vocab: int) -> None:
        self.config = config
        self.num_blocks = num_blocks
        self.max_rows = max_rows
        self.vocab = vocab
        self.slots: dict[int, bytes] = {}  # slot -> all that its key and value depend on
        self.features: dict[str, int] = {}  # content key -> rows
        self.raises: dict[str, BaseException] = {}  # by request id, while its share is in a step
        self.bad_items: dict[str, ErrorInfo] = {}  # by content key, when it is encoded
        self.after_run: Callable[[], None] = lambda: None
        self.says: Callable[[list[Any]], int] | None = None  # the next token, by all before it
        self.failed = False
        self.late: ErrorInfo | None = None  # an error that is told with the result, as of NaN
        self.num_computed = 0  # tokens
        self.num_mixed_steps = 0  # prefill chunks and decodes together
        self.num_cut_items = 0  # chunks that end inside an item
        self.encoded: list[str] = []
        self.begun: dict[str, float] = {}  # content key of what is encoded in slices -> seconds
        self.num_slices = 0
        self.order: list[list[tuple[str, int]]] = []  # per step: (request id, tokens and draft)
        self.events: list[str] = []  # "launch 1", "result 1"
        self.writes: dict[int, dict[int, Any]] = {}  # of steps in flight: whose each block is
        self.num_wasted = 0  # tokens sampled for a sequence that had ended by itself
        self.num_waits = 0  # launches with nothing in flight

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        number = sum(event.startswith("launch") for event in self.events) + 1
        self.events.append(f"launch {number}")
        self.num_waits += not self.writes
        for blocks in self.writes.values():
            for share in batch.sequences:
                for block in share.sequence.block_table:
                    assert blocks.get(block, share.sequence) is share.sequence, "others write there"
        launched = LaunchedStep(self, number, batch.sequences, self.run(batch))
        size = self.config.block_size
        self.writes[number] = {
            block: share.sequence
            for share in batch.sequences
            for block in share.sequence.block_table[share.start // size :]
        }
        return launched

    def run(self, batch: ScheduledBatch) -> StepResult:
        self._check_sizes(batch)
        for key in batch.evict:
            self.features.pop(key, None)
            self.begun.pop(key, None)
        errors: dict[str, ErrorInfo] = {}
        self._encode_slice(batch)
        for item in batch.encode:
            self.begun.pop(item.content_key, None)
            assert item.content_key not in self.features or self.failed, "encoded twice"
            if item.content_key in self.bad_items:
                errors[item.content_key] = self.bad_items[item.content_key]
                continue
            self.features[item.content_key] = item.placeholder.length
            self.encoded.append(item.content_key)
        assert sum(self.features.values()) + self._begun_rows <= self.max_rows
        self._raise_if_told(batch)
        sampled = [self._compute(share, errors) for share in batch.sequences]
        self.order.append([(s.sequence.request.request_id, s.num_rows) for s in batch.sequences])
        self.after_run()
        return StepResult(sampled, slice_is_last=not self.begun)

    def _encode_slice(self, batch: ScheduledBatch) -> None:
        """A second for each row. A bad item fails when it is needed."""
        self._begun_rows = 0
        if batch.encode_slice is None:
            return
        self.num_slices += 1
        item, key = batch.encode_slice.item, batch.encode_slice.item.content_key
        assert not batch.encode, "and no other one whole"
        assert key not in self.features, "encoded twice"
        assert self.begun.keys() <= {key}, "one at a time"
        for share in batch.sequences:
            for other in share.sequence.request.items:
                place = other.placeholder
                touched = place.offset < share.end and place.end > share.start
                assert other.content_key != key or not touched, "it isn't there yet"
        self.begun[key] = self.begun.get(key, 0.0) + batch.encode_slice.seconds
        if self.begun[key] < item.placeholder.length:
            self._begun_rows = item.placeholder.length
            return
        del self.begun[key]
        if key not in self.bad_items:
            self.features[key] = item.placeholder.length
            self.encoded.append(key)

    def _check_sizes(self, batch: ScheduledBatch) -> None:
        assert batch.num_tokens <= self.config.max_num_batched_tokens
        assert batch.num_tokens or batch.encode or batch.evict
        assert len(batch.sequences) <= self.config.max_num_seqs
        assert len({id(share.sequence) for share in batch.sequences}) == len(batch.sequences)
        keys = [item.content_key for item in batch.encode]
        assert len(set(keys)) == len(keys)
        num_rows = sum(item.placeholder.length for item in batch.encode)
        assert num_rows <= self.config.max_num_batched_tokens or len(keys) == 1
        kinds = {share.sequence.num_output_tokens > 0 for share in batch.sequences}
        self.num_mixed_steps += len(kinds) == 2

    def _raise_if_told(self, batch: ScheduledBatch) -> None:
        for share in batch.sequences:
            error = self.raises.get(share.sequence.request.request_id)
            if error is not None:
                self.failed = True  # the same may come once more
                raise error

    def _compute(self, share: ScheduledSequence, errors: dict[str, ErrorInfo]) -> SampledToken:
        sequence, size = share.sequence, self.config.block_size
        assert not sequence.finished
        assert share.num_new_tokens > 0 and share.end <= sequence.num_tokens
        draft, end = list(share.draft_token_ids), share.start + share.num_rows
        if draft:
            self._check_draft(share)
        num_needed = -(-end // size)  # repeated without its draft, a share has more
        assert len(sequence.block_table) == num_needed or self.failed, "as many as needed"
        assert len(set(sequence.block_table)) == len(sequence.block_table)
        output = sequence.output_token_ids
        if output and output[-1] == UNKNOWN_TOKEN:
            output[-1] = sequence.newest
        assert UNKNOWN_TOKEN not in output, "only the newest can be"
        rows = content(sequence.request) + output + draft
        pasts = all_pasts(sequence.request.cache_salt, rows[:end])
        self.num_computed += share.num_rows
        for position in range(end):
            slot = sequence.block_table[position // size] * size + position % size
            assert 0 <= slot < self.num_blocks * size
            if position >= share.start:
                row = rows[position]
                if isinstance(row, tuple):
                    if row[0] in errors:
                        return SampledToken(error=errors[row[0]])
                    assert row[1] < self.features[row[0]], "features must be there"
                self.slots[slot] = pasts[position]
            assert self.slots[slot] == pasts[position], (
                "what is read must be what would be computed"
            )
        for item in sequence.request.items:
            self.num_cut_items += item.placeholder.offset < share.end < item.placeholder.end
        if not share.samples:
            return SampledToken()
        sampled: list[SampledToken] = []
        for number in range(len(draft) + 1):
            known = rows[: sequence.num_tokens + number]
            says = self.says or (lambda rows: next_token(rows, sequence.index, self.vocab))
            token_id = says(known)
            sampled.append(SampledToken(token_id, -1.5, 1, [(token_id, -1.5), (64, -2.5)]))
            if draft[number : number + 1] != [token_id]:
                break
        sampled[-1].accepted = tuple(sampled[:-1])
        sequence.newest = sampled[-1].token_id
        return sampled[-1]

    def _check_draft(self, share: ScheduledSequence) -> None:
        sequence, params = share.sequence, share.sequence.request.sampling_params
        assert share.samples and share.num_new_tokens == 1 and sequence.num_output_tokens > 0
        num = len(share.draft_token_ids)
        assert num <= self.config.num_speculative_tokens
        assert sequence.num_output_tokens + num < (params.max_tokens or 0), "can't all be taken"
        assert PLACEHOLDER_ID not in share.draft_token_ids


def assert_given_back(engine: Engine, runner: CheckingRunner) -> None:
    """Nothing is left to do, in flight or held."""
    assert not engine.has_work and not runner.writes
    assert engine.kv_cache.num_free_blocks == engine.kv_cache.num_blocks
    assert not engine.encoder_cache._num_pins
