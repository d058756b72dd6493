"""Who runs in each step, and how many tokens of each. The policy, in the order it is applied:

1. Finished and aborted sequences leave (`Departures`), and those whose last token is on its way.
2. Every sequence that is decoding gets one token.
3. Sequences in the middle of their prompt get the next chunk of it, and waiting ones are admitted
   and get their first, in order of rank. A prompt begins behind the blocks that the KV cache
   still holds of it; one that would compute a block which another computes in this step waits
   for the next, and finds it there.
4. Sequences that are decoding get drafts (`PromptLookup`), by rank, out of the tokens, the free
   blocks and, where there is a pace, the time that is left then. So a draft costs nobody a token,
   a place or a block, and no more time than a prompt might.

All of it within one budget of `max_num_batched_tokens`, at most `max_num_seqs` running. A chunk
is as long as the budget allows, and may end inside an image.

Rank is by the request's priority (the lower number goes first), and by arrival within one
priority. 2 and 3 go by rank, and 3 admits none once it met one that can't be.

Decodes keep their pace. Beside decodes, prompts get only as many tokens as lengthen the step to
`pace.max_slowdown` times what the decodes alone would take, and images are encoded in slices of
the time that is left of that (whole, where the device can't slice: `slices_images`). An image
that nobody wants any more is given up. Prompts are not starved either: some tokens always ride
along, a slice is encoded in each step that has the time, and both go to the first in rank.
Without decodes, or without a `pace`, a step takes all that the budget allows.

When blocks of the KV cache run out (those that are kept but unused count as free), the running
sequence that is last in rank is preempted: it gives up its blocks, returns to the front of its
priority in the waiting queue, and computes again what of its prompt and output the cache no longer
holds then. A running sequence never preempts one before it in rank; it waits, and while it waits
for blocks none behind it is admitted. A waiting sequence preempts running ones of a worse priority
when it lacks their seat or their blocks, never one of its own priority.

Nobody waits for ever, unless requests of a better priority keep coming. What the first in rank
lacks can only be held by others: their seats and blocks it takes; rows of the encoder cache that
another has pinned inside an image, or that an image takes which is being encoded in slices, it
waits for, and meanwhile nobody behind it may pin more. If those holders can't move either (they
wait for blocks that the first holds), no sequence can be scheduled: then the last is preempted,
until one can. The last one left has the whole pool and the whole encoder cache to itself, and
what doesn't fit those was refused when it came.

A step may be planned while the one before it is in flight: launched, and its result not known. It
goes by what is sure to come: tokens that are sampled count before their ids are known. What the
step in flight writes to stays with whoever has it, so nobody is preempted then, and who has left
keeps its blocks until the result is there. Where that holds somebody up, `waits_for_result` says
so: the next step should be planned with nothing in flight.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_right, insort
from collections.abc import Iterable

from mm_engine.engine.departures import Departures
from mm_engine.engine.encoder_cache import EncoderCache
from mm_engine.engine.kv_cache import KVCache
from mm_engine.engine.pace import MIN_PROMPT_TOKENS, Pace
from mm_engine.engine.prompt_lookup import PromptLookup
from mm_engine.engine.waiting_queue import WaitingQueue
from mm_engine.sequence import (
    EncodeSlice,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    SequenceStatus,
)

MIN_SLICE = 0.25  # of the time that a step's decodes can spare; less isn't worth a slice


class Scheduler:
    """Plans steps over the sequences that it was given with `add`."""

    def __init__(
        self,
        kv_cache: KVCache,
        encoder_cache: EncoderCache,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
        pace: Pace | None = None,
        slices_images: bool = True,
        prompt_lookup: PromptLookup | None = None,
    ) -> None:
        assert max_num_batched_tokens >= 1 and max_num_seqs >= 1
        self.kv_cache = kv_cache
        self.encoder_cache = encoder_cache
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.pace = pace
        self.slices_images = slices_images
        self.prompt_lookup = prompt_lookup  # None: no drafts
        self.running: list[Sequence] = []  # by rank
        self.waiting = WaitingQueue()
        self.num_preemptions = 0
        self._num_added = 0
        self.waits_for_result = False  # somebody must be preempted, which nothing in flight allows
        self.departures = Departures(kv_cache, encoder_cache)
        self._suspect_keys: list[str] = []  # of features that a failed step may not have made
        # Of the step being planned:
        self._plan: dict[Sequence, int] = {}  # new tokens by sequence
        self._budget = 0  # tokens that it may still take
        self._spare = math.inf  # seconds that its decodes can still spare for prompts and images
        self._least_spare = 0.0  # seconds from which on a slice of an image's encoding is worth it
        self._in_flight: ScheduledBatch | None = None
        self._coming: set[bytes] = set()  # keys of the blocks that the plan's chunks complete
        self._coming_in_flight: set[bytes] = set()  # and those of the step in flight
        self._has_prompt = False  # a chunk of a prompt is planned
        self._slice: EncodeSlice | None = None
        self._lacking: Sequence | None = None  # the first in rank that waits for blocks
        self._admits = True  # no waiting sequence has yet been found that can't be admitted

    @property
    def has_work(self) -> bool:
        """Whether `schedule` has anything to plan or to take back."""
        return bool(self.running or self.waiting or self.departures)

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence whose request passed `check_request`."""
        sequence.arrival, sequence.arrival_time = self._num_added, time.monotonic()
        self._num_added += 1
        self.waiting.add(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Mark a sequence as ended, by whatever cause; it leaves when the next step is planned."""
        assert not sequence.finished
        sequence.status = SequenceStatus.FINISHED
        self.departures.add(sequence)

    def retire(self, sequence: Sequence) -> None:
        """Note that a launched step is a sequence's last: its seat is free in the next."""
        self.departures.add(sequence)

    def distrust(self, keys: Iterable[str]) -> None:
        """Note that the last step may not have made these features, as a sequence failed in it.

        Those that a surviving sequence needed in that step exist; the others are encoded again.
        """
        self._suspect_keys += keys

    def schedule(self, in_flight: ScheduledBatch | None = None) -> ScheduledBatch:
        """Plan the next step, behind one that may be in flight.

        It is empty only if nothing is left to compute, or until the result of the step in flight
        is there.
        """
        self._in_flight, self.waits_for_result = in_flight, False
        self._coming_in_flight = self._coming if in_flight else set()
        self.departures.leave(self.running, self.waiting, in_flight)
        self.encoder_cache.discard(self._suspect_keys)
        self._suspect_keys = []
        self._fill_plan()
        while not self._moves and not in_flight and (self.running or self.waiting):
            assert len(self.running) > 1, "a sequence alone must always be able to run"
            self._preempt(self.running[-1])
            self._fill_plan()
        if not self._moves:
            return ScheduledBatch(())
        encode, evict = self.encoder_cache.end_step()
        shares: list[ScheduledSequence] = []
        for sequence, num_new_tokens in self._plan.items():
            draft = self._draft(sequence, self.prompt_lookup) if self.prompt_lookup else ()
            shares.append(ScheduledSequence(sequence, num_new_tokens, draft))
        return ScheduledBatch(tuple(shares), encode, evict, self._slice)

    @property
    def _moves(self) -> bool:
        """Whether the plan computes anything."""
        return bool(self._plan or self.encoder_cache.is_encoding)

    def _fill_plan(self) -> None:
        self._plan, self._coming = {}, set()
        self._budget, self._spare = self.max_num_batched_tokens, math.inf
        self._has_prompt, self._slice, self._lacking, self._admits = False, None, None, True
        self.encoder_cache.begin_step()

        decoding: list[Sequence] = []
        prefilling: list[Sequence] = []
        for sequence in self.running:
            (decoding if _decodes(sequence) else prefilling).append(sequence)
        for sequence in decoding:
            if sequence.status is SequenceStatus.RUNNING and self._budget:
                self._decode(sequence)
        if self.pace is not None and self._plan:
            self._spare = self.pace.spare_seconds(len(self._plan))
            self._least_spare = MIN_SLICE * self._spare
        if self._spare < math.inf and self.slices_images:
            self.encoder_cache.slice_items()
        else:
            self.encoder_cache.finish_slices()
        for sequence in prefilling:
            self._admit_all(before=sequence.rank)
            # One that was preempted a moment ago waits, or has just been admitted again.
            if sequence.status is SequenceStatus.RUNNING and sequence not in self._plan:
                self._continue(sequence)
        self._admit_all(before=None)
        self._encode_slice(wanted=False)

    def _decode(self, sequence: Sequence) -> None:
        """Plan the newest token of a running sequence, if it can have a block for it."""
        if self.kv_cache.append(sequence, 1) or self._make_blocks(sequence, 1):
            self._plan[sequence] = 1
            self._budget -= 1

    def _continue(self, sequence: Sequence) -> None:
        """Plan the next chunk of a running sequence's prompt, if it can have what it needs."""
        num_new_tokens = self._num_next_tokens(sequence)
        if num_new_tokens and self._make_blocks(sequence, num_new_tokens):
            self._put(sequence, num_new_tokens)
        self._encode_slice(wanted=True)

    def _admit_all(self, *, before: tuple[int, int] | None) -> None:
        """Admit waiting sequences that come `before` a rank, up to one that can't be."""
        while self.waiting and self._admits:
            sequence = self.waiting.first
            if before is not None and sequence.rank > before:
                return
            self._admits = self._admit(sequence)
            self._encode_slice(wanted=True)

    def _admit(self, sequence: Sequence) -> bool:
        """Give the first waiting sequence what the cache holds of it, and a first chunk."""
        if self._lacking is not None and self._lacking.rank < sequence.rank:
            return False
        found = self.kv_cache.lookup(sequence)
        # What is computed for another needn't be computed twice: a later step finds it.
        wanted = self.kv_cache.key_wanted(sequence, found)
        if wanted in self._coming or wanted in self._coming_in_flight:
            return False
        sequence.num_computed_tokens = len(found) * self.kv_cache.block_size
        num_new_tokens = self._num_next_tokens(sequence)
        if num_new_tokens == 0 or not self._make_room(sequence, found):
            sequence.num_computed_tokens = 0
            return False
        self.waiting.remove(sequence)
        if sequence.start_time is None:  # recomputing after preemption isn't a start
            sequence.start_time = time.monotonic()
        sequence.status = SequenceStatus.RUNNING
        insort(self.running, sequence, key=_rank)
        self.kv_cache.adopt(sequence, found)
        appended = self.kv_cache.append(sequence, num_new_tokens)
        assert appended, "can_admit said so"
        self._put(sequence, num_new_tokens)
        return True

    def _make_room(self, sequence: Sequence, found: list[int]) -> bool:
        """Preempt running sequences of a worse priority, the last first, if that makes room.

        All that a sequence has so far must find it, or it would soon be preempted again.
        """
        worse = self.running[bisect_right(self.running, sequence.request.priority, key=_priority) :]
        if len(self.running) - len(worse) >= self.max_num_seqs:
            return False
        if not self.kv_cache.can_admit(sequence, found, freed=worse):
            return False
        while len(self.running) >= self.max_num_seqs or not self.kv_cache.can_admit(
            sequence, found
        ):
            if not self._may_preempt():
                return False
            self._preempt(self.running[-1])
        return True

    def _num_next_tokens(self, sequence: Sequence) -> int:
        """How many of its next tokens a sequence may compute in this step, blocks apart."""
        most = min(sequence.num_uncomputed_tokens, self._budget)
        spared = self._num_spared_tokens(most)
        if not self._has_prompt and self._slice is None:
            spared = min(most, max(spared, MIN_PROMPT_TOKENS))
        return self.encoder_cache.cut(sequence, spared) if spared else 0

    def _num_spared_tokens(self, most: int) -> int:
        """How many tokens more, `most` at most, the step's decodes can spare the time for."""
        if self.pace is None or self._spare == math.inf:
            return most
        num_planned = self.max_num_batched_tokens - self._budget
        return self.pace.num_tokens_more(num_planned, self._spare, most)

    def _encode_slice(self, *, wanted: bool) -> None:
        """Give what time the decodes can spare to an image; with `wanted` only if one is lacked."""
        if self._spare == math.inf or self._spare < self._least_spare:
            return
        item = self.encoder_cache.next_slice(wanted=wanted)  # none where items aren't sliced
        if item is not None:
            self._slice = EncodeSlice(item, self._spare)
            self._spare = 0.0

    def _put(self, sequence: Sequence, num_new_tokens: int) -> None:
        """Plan a chunk of a prompt; its blocks are there."""
        assert sequence not in self._plan
        self._plan[sequence] = num_new_tokens
        self._spend(num_new_tokens)
        self._has_prompt = True
        self.encoder_cache.take(sequence, num_new_tokens)
        self._coming.update(self.kv_cache.keys_completed_by(sequence, num_new_tokens))

    def _spend(self, num_tokens: int) -> None:
        """Take tokens beside decodes from what the step may still take, and their time."""
        if self.pace is not None and self._spare < math.inf:
            num_planned = self.max_num_batched_tokens - self._budget
            longer = self.pace.seconds(num_planned + num_tokens)
            self._spare = max(0.0, self._spare - longer + self.pace.seconds(num_planned))
        self._budget -= num_tokens

    def _draft(self, sequence: Sequence, lookup: PromptLookup) -> tuple[int, ...]:
        """A draft for a sequence of the finished plan, and room for it; empty where none fits."""
        if not _decodes(sequence):
            return ()
        max_tokens = sequence.request.sampling_params.max_tokens or 1
        # The step brings a token more than is accepted: a longer draft would be for nothing.
        wanted = max_tokens - sequence.num_output_tokens - 1
        room = min(self._budget, self.kv_cache.room_for(sequence) - self._plan[sequence])
        draft = lookup.propose(sequence, self._num_spared_tokens(min(wanted, room)))
        appended = self.kv_cache.append(sequence, self._plan[sequence] + len(draft))
        assert appended, "room_for said so"
        self._spend(len(draft))
        return draft

    def _make_blocks(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Give a sequence blocks for its next tokens: preempt those behind it, the last first.

        If that doesn't suffice, none is preempted, and the sequence is noted as lacking blocks.
        """
        if self.kv_cache.append(sequence, num_new_tokens):
            return True
        behind = self.running[self.running.index(sequence) + 1 :]
        num_free = self.kv_cache.num_free_blocks + self.kv_cache.num_freed_by(behind)
        lacks = self.kv_cache.num_missing_blocks(sequence, num_new_tokens) > num_free
        if lacks or not self._may_preempt():
            if self._lacking is None or sequence.rank < self._lacking.rank:
                self._lacking = sequence
            return False
        while not self.kv_cache.append(sequence, num_new_tokens):
            self._preempt(self.running[-1])
        return True

    def _may_preempt(self) -> bool:
        """Whether nothing is in flight; else its result is waited for, so that the next step may.

        A sequence in flight can't give up its blocks: it is about to write to them.
        """
        self.waits_for_result = self._in_flight is not None
        return not self.waits_for_result

    def _preempt(self, sequence: Sequence) -> None:
        assert self.running[-1] is sequence
        self.running.pop()
        self.kv_cache.free(sequence)
        self.encoder_cache.release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.put_back(sequence)
        # Only a decode can have been planned before the turn of one ahead of it in rank: no item
        # of the plan was meant for it, and its token goes back to the budget.
        self._budget += self._plan.pop(sequence, 0)


def _decodes(sequence: Sequence) -> bool:
    """Whether all but the newest output token is computed: the step needs no item's features."""
    num_tokens = len(sequence.token_ids)  # no properties: this runs often for each in each step
    return num_tokens - sequence.num_computed_tokens == 1 and num_tokens > len(
        sequence.request.prompt_token_ids
    )


def _rank(sequence: Sequence) -> tuple[int, int]:
    return sequence.rank


def _priority(sequence: Sequence) -> int:
    return sequence.request.priority
