"""Sequences that wait to run, the first in rank first."""

from __future__ import annotations

from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator

from mm_engine.sequence import Sequence


class WaitingQueue:
    """Sequences by priority (the lowest number first), and by arrival within one priority.

    Every operation takes the same time however many wait; only the number of different
    priorities counts.
    """

    def __init__(self) -> None:
        self._priorities: list[int] = []  # those that somebody has, rising
        self._by_priority: dict[int, OrderedDict[Sequence, None]] = {}
        self._num_sequences = 0

    def __len__(self) -> int:
        return self._num_sequences

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._by_priority.get(sequence.request.priority, ())

    def __iter__(self) -> Iterator[Sequence]:
        for priority in self._priorities:
            yield from self._by_priority[priority]

    @property
    def first(self) -> Sequence:
        """Whose turn is next; somebody must be waiting."""
        return next(iter(self._by_priority[self._priorities[0]]))

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence that has just arrived, behind those of its priority."""
        self._queue_of(sequence)[sequence] = None
        self._num_sequences += 1

    def put_back(self, sequence: Sequence) -> None:
        """Queue a sequence that has run before, ahead of those of its priority."""
        queue = self._queue_of(sequence)
        queue[sequence] = None
        queue.move_to_end(sequence, last=False)
        self._num_sequences += 1

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is to run, or that has ended."""
        priority = sequence.request.priority
        queue = self._by_priority[priority]
        del queue[sequence]
        self._num_sequences -= 1
        if not queue:
            del self._by_priority[priority]
            self._priorities.remove(priority)

    def _queue_of(self, sequence: Sequence) -> OrderedDict[Sequence, None]:
        priority = sequence.request.priority
        if priority not in self._by_priority:
            self._by_priority[priority] = OrderedDict()
            insort(self._priorities, priority)
        return self._by_priority[priority]
