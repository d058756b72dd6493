"""Who runs in each step, and how many tokens of each. The policy, in the order it is applied:

1. Finished and aborted sequences leave. Nothing else in the engine takes a sequence out.
2. Every sequence that is decoding gets one token.
3. Sequences in the middle of their prompt get the next chunk of it.
4. Waiting sequences are admitted, in order of arrival, and get their first chunk. It begins
   behind the blocks that the KV cache still holds of them; one that would compute a block which
   another computes in this step waits for the next, and finds it there.

All of it within one budget of `max_num_batched_tokens`, at most `max_num_seqs` running. A chunk
is as long as the budget allows, and may end inside an image.

Older means: arrived earlier. Within 2 and 3 the older go first, 4 stops at the first that can't
be admitted, and so every running sequence is older than every waiting one.

When blocks of the KV cache run out (those that are kept but unused count as free), the youngest
running sequence is preempted: it gives up its blocks, returns to the front of the waiting queue,
and computes again what of its prompt and output the cache no longer holds then. A sequence never
preempts an older one; it waits, and while one waits for blocks none is admitted.

Nobody waits for ever. What the oldest running sequence lacks can only be held by younger ones:
blocks it takes from them; rows of the encoder cache, pinned by a younger sequence inside an
image, it waits for, and meanwhile nobody younger may pin more. If those holders can't move
either (they wait for blocks that the oldest holds), no sequence can be scheduled: then the
youngest is preempted, until one can. The last one left has the whole pool and the whole encoder
cache to itself, and `add` refuses what doesn't fit those.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from mm_engine.engine.encoder_cache import EncoderCache
from mm_engine.engine.kv_cache import KVCache
from mm_engine.errors import RequestError
from mm_engine.request import Request
from mm_engine.sequence import ScheduledBatch, ScheduledSequence, Sequence, SequenceStatus


class Scheduler:
    """Plans steps over the sequences that it was given with `add`."""

    def __init__(
        self,
        kv_cache: KVCache,
        encoder_cache: EncoderCache,
        *,
        max_num_batched_tokens: int,
        max_num_seqs: int,
    ) -> None:
        assert max_num_batched_tokens >= 1 and max_num_seqs >= 1
        self.kv_cache = kv_cache
        self.encoder_cache = encoder_cache
        self.max_num_batched_tokens = max_num_batched_tokens
        self.max_num_seqs = max_num_seqs
        self.running: list[Sequence] = []  # oldest first
        self.waiting: OrderedDict[Sequence, None] = OrderedDict()  # oldest first
        self.num_preemptions = 0
        self._leaving: list[Sequence] = []  # finished; still hold their blocks
        self._suspect_keys: list[str] = []  # of features that a failed step may not have made
        self._plan: dict[Sequence, int] = {}  # new tokens by sequence, for the step being planned
        self._budget = 0  # tokens that the step being planned may still take
        self._coming: set[bytes] = set()  # keys of the blocks that the plan's chunks complete

    @property
    def has_work(self) -> bool:
        """Whether `schedule` has anything to plan or to take back."""
        return bool(self.running or self.waiting or self._leaving)

    def check(self, request: Request) -> None:
        """Refuse what could never be computed.

        Raises:
            RequestError: the request doesn't fit the pool or the encoder cache, even alone.
        """
        num_prompt_tokens = len(request.prompt_token_ids)
        max_tokens = request.sampling_params.max_tokens or 1
        if num_prompt_tokens + max_tokens > self.kv_cache.max_tokens:
            raise RequestError(
                f"Prompt and max_tokens exceed the KV cache: {num_prompt_tokens} + {max_tokens} "
                f"of {self.kv_cache.max_tokens} tokens. Shorten the prompt or lower max_tokens.",
                param="max_tokens",
            )
        max_rows = self.encoder_cache.max_rows
        for item in request.items:
            if item.placeholder.length > max_rows:
                raise RequestError(
                    f"{item.modality} {item.placeholder.item} exceeds the encoder cache: "
                    f"{item.placeholder.length} of {max_rows} tokens. Send a smaller one.",
                    param="messages",
                )

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence whose request passed `check`."""
        self.waiting[sequence] = None

    def finish(self, sequence: Sequence) -> None:
        """Mark a sequence as ended, by whatever cause; it leaves when the next step is planned."""
        assert not sequence.finished
        sequence.status = SequenceStatus.FINISHED
        self._leaving.append(sequence)

    def distrust(self, keys: Iterable[str]) -> None:
        """Note that the last step may not have made these features, as a sequence failed in it.

        Those that a surviving sequence needed in that step exist; the others are encoded again.
        """
        self._suspect_keys += keys

    def schedule(self) -> ScheduledBatch:
        """Plan the next step; empty only if nothing is left to compute."""
        self._remove_finished()
        self._fill_plan()
        while not self._plan and (self.running or self.waiting):
            assert len(self.running) > 1, "a sequence alone must always be able to run"
            self._preempt(self.running[-1])
            self._fill_plan()
        if not self._plan:
            return ScheduledBatch(())
        encode, evict = self.encoder_cache.end_step()
        sequences = tuple(ScheduledSequence(seq, num) for seq, num in self._plan.items())
        return ScheduledBatch(sequences, encode, evict)

    def _remove_finished(self) -> None:
        for sequence in self._leaving:
            if sequence in self.running:
                self.running.remove(sequence)
            else:
                del self.waiting[sequence]
            self.kv_cache.free(sequence)
            self.encoder_cache.release(sequence)
        self.encoder_cache.discard(self._suspect_keys)
        self._leaving, self._suspect_keys = [], []

    def _fill_plan(self) -> None:
        self._plan = {}
        self._coming = set()
        self.encoder_cache.begin_step()
        self._budget = self.max_num_batched_tokens
        blocks_suffice = True

        decoding = [seq for seq in self.running if _decodes(seq)]
        prefilling = [seq for seq in self.running if not _decodes(seq)]
        for sequence in decoding + prefilling:
            if sequence.status is not SequenceStatus.RUNNING:
                continue  # preempted a moment ago
            num_new_tokens = min(sequence.num_uncomputed_tokens, self._budget)
            num_new_tokens = self.encoder_cache.cut(sequence, num_new_tokens)
            if num_new_tokens == 0:
                continue
            if self._make_blocks(sequence, num_new_tokens):
                self._put(sequence, num_new_tokens)
            else:
                blocks_suffice = False

        while self.waiting and len(self.running) < self.max_num_seqs and blocks_suffice:
            if not self._admit(next(iter(self.waiting))):
                break

    def _admit(self, sequence: Sequence) -> bool:
        """Give the first waiting sequence what the cache holds of it, and a first chunk."""
        found = self.kv_cache.lookup(sequence)
        # What this step computes for another needn't be computed twice: the next step finds it.
        if self.kv_cache.key_wanted(sequence, found) in self._coming:
            return False
        # All it has so far must find room, or it would soon be preempted again.
        if not self.kv_cache.can_admit(sequence, found):
            return False
        sequence.num_computed_tokens = len(found) * self.kv_cache.block_size
        num_new_tokens = min(sequence.num_uncomputed_tokens, self._budget)
        num_new_tokens = self.encoder_cache.cut(sequence, num_new_tokens)
        if num_new_tokens == 0:
            sequence.num_computed_tokens = 0
            return False
        del self.waiting[sequence]
        sequence.status = SequenceStatus.RUNNING
        self.running.append(sequence)
        self.kv_cache.adopt(sequence, found)
        self._put(sequence, num_new_tokens)
        return True

    def _put(self, sequence: Sequence, num_new_tokens: int) -> None:
        assert sequence not in self._plan
        self.kv_cache.append(sequence, num_new_tokens)
        self.encoder_cache.take(sequence, num_new_tokens)
        self._plan[sequence] = num_new_tokens
        self._budget -= num_new_tokens
        if not _decodes(sequence):
            self._coming.update(self.kv_cache.keys_completed_by(sequence, num_new_tokens))

    def _make_blocks(self, sequence: Sequence, num_new_tokens: int) -> bool:
        """Preempt younger sequences, youngest first, until the blocks suffice; if they ever can."""
        if self.kv_cache.can_append(sequence, num_new_tokens):
            return True
        younger = self.running[self.running.index(sequence) + 1 :]
        num_free = self.kv_cache.num_free_blocks + self.kv_cache.num_freed_by(younger)
        if self.kv_cache.num_missing_blocks(sequence, num_new_tokens) > num_free:
            return False
        while not self.kv_cache.can_append(sequence, num_new_tokens):
            self._preempt(self.running[-1])
        return True

    def _preempt(self, sequence: Sequence) -> None:
        assert self.running[-1] is sequence
        self.running.pop()
        self.kv_cache.free(sequence)
        self.encoder_cache.release(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_computed_tokens = 0
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting[sequence] = None
        self.waiting.move_to_end(sequence, last=False)
        # Only a decode can have been planned before an older sequence's turn: no item of the
        # plan was meant for it, and its token goes back to the budget.
        self._budget += self._plan.pop(sequence, 0)


def _decodes(sequence: Sequence) -> bool:
    """Whether all but the newest output token is computed: the step needs no item's features."""
    return sequence.num_uncomputed_tokens == 1 and sequence.num_output_tokens > 0
