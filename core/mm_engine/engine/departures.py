"""How sequences leave: their seat is free at once, what they hold when nothing writes to it.

Nothing else in the engine takes a sequence out.
"""

from __future__ import annotations

from itertools import chain

from mm_engine.engine.encoder_cache import EncoderCache
from mm_engine.engine.kv_cache import KVCache
from mm_engine.engine.waiting_queue import WaitingQueue
from mm_engine.request import Item
from mm_engine.sequence import ScheduledBatch, Sequence


class Departures:
    """Sequences that have ended or are in their last step, until they have given back all."""

    def __init__(self, kv_cache: KVCache, encoder_cache: EncoderCache) -> None:
        self.kv_cache = kv_cache
        self.encoder_cache = encoder_cache
        self._new: list[Sequence] = []  # still among those that run or wait
        self._holding: list[Sequence] = []  # their blocks and features

    def __bool__(self) -> bool:
        """Whether anybody has yet to leave."""
        return bool(self._new or self._holding)

    def add(self, sequence: Sequence) -> None:
        """Let a sequence leave when the next step is planned. One may be added twice."""
        self._new.append(sequence)

    def leave(
        self, running: list[Sequence], waiting: WaitingQueue, in_flight: ScheduledBatch | None
    ) -> None:
        """Take out who leaves; who isn't in a step in flight gives back blocks and features too.

        A step in flight writes to its sequences' blocks, and NaN in them is only cleaned when its
        result is taken: nobody else may have them before.
        """
        if not self:
            return
        for sequence in self._new:
            if sequence in waiting:
                waiting.remove(sequence)
            elif sequence in running:
                running.remove(sequence)
        coming = self.encoder_cache.coming
        if coming is not None and any(_wants(sequence, coming) for sequence in self._new):
            others = chain(running, waiting)
            if not any(_wants(sequence, coming) for sequence in others):
                self.encoder_cache.cancel_slices()
        busy = {share.sequence for share in in_flight.sequences} if in_flight else set()
        leaving, self._holding, self._new = self._holding + self._new, [], []
        for sequence in leaving:
            if sequence in busy:
                self._holding.append(sequence)
            else:
                self.kv_cache.free(sequence)
                self.encoder_cache.release(sequence)


def _wants(sequence: Sequence, item: Item) -> bool:
    """Whether a sequence has yet to compute tokens of such an item."""
    return any(
        mine.content_key == item.content_key and mine.placeholder.end > sequence.num_computed_tokens
        for mine in sequence.request.items
    )
