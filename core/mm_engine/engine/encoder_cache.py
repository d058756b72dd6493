"""Which items' features are kept, and for whom: the policy. The tensors live in the worker.

The worker is told by the step's plan: `ScheduledBatch.encode` lists the items to encode in it,
`ScheduledBatch.evict` the content keys to drop first.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable

from mm_engine.request import Item
from mm_engine.sequence import Sequence


class EncoderCache:
    """Features of up to `max_rows` rows (one row is one placeholder token), kept by content key.

    A sequence pins an item's features from the step that first computes a token of its range
    until all of that range is computed. Unpinned features stay for others with the same content
    until their rows are wanted; the least recently used go first.

    `max_step_rows` bounds the rows encoded in one step, except that one item always may be.

    In a step that calls `slice_items` nothing is encoded whole. One item at a time is then encoded
    over several steps: it takes its rows when that begins, is pinned by the cache itself, and can
    be had when `complete` has been called. If nobody wants it any more, `cancel_slices` drops it.
    """

    def __init__(self, max_rows: int, max_step_rows: int) -> None:
        self.max_rows = max_rows
        self.max_step_rows = max_step_rows
        self.num_hits = 0  # items whose features were there when a sequence came to them
        self.num_encodes = 0
        self._rows: OrderedDict[str, int] = OrderedDict()  # resident: rows by key, oldest use first
        self._num_pins: Counter[str] = Counter()  # only keys that are pinned
        self._pinned_by: dict[Sequence, list[Item]] = {}
        self._num_rows = 0
        self._encode: list[Item] = []  # of the step being planned
        self._num_step_rows = 0
        self._evict: list[str] = []  # since the last plan that was handed out
        self._refused = False  # somebody lacked rows in this step
        self._sliced = False  # this step encodes no item whole
        self._wanted: Item | None = None  # the first whose lack cut a chunk of this step
        self._coming: Item | None = None  # is being encoded over several steps
        self._ending: Item | None = None  # was such a one; this step encodes the rest of it
        self._cancelled = False  # the worker has to be told that it stops
        self._untaken: set[str] = set()  # encoded in slices, and not yet had by who wanted them

    @property
    def num_rows(self) -> int:
        """Rows of all resident features; never above `max_rows`."""
        return self._num_rows

    @property
    def is_encoding(self) -> bool:
        """Whether the plan encodes something whole, or something is or was encoded in part."""
        return bool(self._encode or self._coming or self._cancelled)

    @property
    def coming(self) -> Item | None:
        """What is being encoded over several steps."""
        return self._coming

    def begin_step(self) -> None:
        """Start to plan a step. Pins whose ranges have been computed are dropped."""
        assert not self._encode, "a plan with items to encode was not handed out"
        self._num_step_rows = 0
        self._refused = False
        self._sliced = False
        self._wanted = None
        if self._ending is not None:
            self._unpin_key(self._ending.content_key)
            self._ending = None
        for sequence in list(self._pinned_by):
            self._unpin(sequence, up_to=sequence.num_computed_tokens)

    def slice_items(self) -> None:
        """From here on, this step encodes no item whole."""
        self._sliced = True

    def finish_slices(self) -> None:
        """Let this step encode the rest of what was encoded in part."""
        if self._coming is not None:
            self._encode.append(self._coming)
            self._num_step_rows += self._coming.placeholder.length
            self._untaken.add(self._coming.content_key)
            self._ending, self._coming = self._coming, None  # pinned while this step is planned

    def cancel_slices(self) -> None:
        """Drop what was encoded in part; the next plan tells the worker."""
        assert self._coming is not None
        self._unpin_key(self._coming.content_key)
        self._drop(self._coming.content_key)
        self._coming, self._cancelled = None, True

    def next_slice(self, *, wanted: bool) -> Item | None:
        """The item of which this step may encode a slice, if there is one.

        With `wanted` only if a sequence that has asked in this step lacks an item.
        """
        if self._coming is None and self._wanted is not None:
            self._coming = self._wanted
            self._num_pins[self._coming.content_key] += 1
            self._reserve(self._coming)
            return self._coming
        return None if wanted and self._wanted is None else self._coming

    def complete(self) -> None:
        """Note that the item that was encoded in slices is whole."""
        assert self._coming is not None
        self._unpin_key(self._coming.content_key)
        self._untaken.add(self._coming.content_key)
        self._coming = None

    def cut(self, sequence: Sequence, num_new_tokens: int) -> int:
        """How many of the next `num_new_tokens` can be computed, for all that features decide.

        The chunk is cut before the first item whose features can't be had in this step. Once a
        sequence lacked rows, nobody asking later in the step may pin anything new: the callers
        ask in order of rank, so none is starved by those behind it. Where an item that is encoded
        in slices has the rows, it is wanted, so that it comes to its end.
        """
        needed = self._needed(sequence, num_new_tokens)
        if not needed:
            return num_new_tokens
        start = sequence.num_computed_tokens
        num_pinned_rows = sum(self._rows[key] for key in self._num_pins)
        num_step_rows = self._num_step_rows
        seen: set[str] = set()
        for item in needed:
            key, rows = item.content_key, item.placeholder.length
            is_coming = self._coming is not None and self._coming.content_key == key
            if not is_coming and (key in self._num_pins or key in seen):
                continue
            # A running sequence has pinned the range that it has begun. One that is yet to be
            # admitted may begin inside a range, where the KV cache holds the first part: it gets
            # the features with its first chunk, or isn't admitted.
            before = max(0, item.placeholder.offset - start)
            if not is_coming and (self._refused or num_pinned_rows + rows > self.max_rows):
                self._refused = True
                if self._sliced:
                    self._wanted = self._wanted or self._coming
                return before
            if self._sliced and (is_coming or key not in self._rows):
                self._wanted = self._wanted or item
                return before
            if key not in self._rows:
                if num_step_rows and num_step_rows + rows > self.max_step_rows:
                    return before
                num_step_rows += rows
            num_pinned_rows += rows
            seen.add(key)
        return num_new_tokens

    def take(self, sequence: Sequence, num_new_tokens: int) -> None:
        """Pin the features that the next `num_new_tokens` need; plan to encode what is missing."""
        needed = self._needed(sequence, num_new_tokens)
        if not needed:
            return
        mine = self._pinned_by.setdefault(sequence, [])
        new = [item for item in needed if not any(item is pinned for pinned in mine)]
        missing: dict[str, Item] = {}
        for item in new:  # pin all before making room, so that none of these is what gives way
            key = item.content_key
            if key in self._rows:
                self.num_hits += key not in self._untaken
                self._untaken.discard(key)
                self._rows.move_to_end(key)
            else:
                missing.setdefault(key, item)
            self._num_pins[key] += 1
        mine += new
        for item in missing.values():
            self._reserve(item)
            self._num_step_rows += item.placeholder.length
            self._encode.append(item)

    def end_step(self) -> tuple[tuple[Item, ...], tuple[str, ...]]:
        """The items to encode in the planned step, and the content keys to drop before."""
        plan = tuple(self._encode), tuple(self._evict)
        self._encode, self._evict, self._cancelled = [], [], False
        return plan

    def release(self, sequence: Sequence) -> None:
        """Drop all pins of a sequence that is preempted or has left."""
        self._unpin(sequence, up_to=None)

    def discard(self, keys: Iterable[str]) -> None:
        """Forget features that may not exist, because the step that should have made them failed.

        Pinned ones stay: whoever pins them went through that step unharmed.
        """
        for key in keys:
            if key in self._rows and key not in self._num_pins:
                self._drop(key)

    def _needed(self, sequence: Sequence, num_new_tokens: int) -> list[Item]:
        items, start = sequence.request.items, sequence.num_computed_tokens
        if not items or items[-1].placeholder.end <= start:  # as in every decode
            return []
        end = start + num_new_tokens  # items come in order of offset
        return [i for i in items if i.placeholder.end > start and i.placeholder.offset < end]

    def _reserve(self, item: Item) -> None:
        """Take the rows of an item that is going to be encoded; it must be pinned."""
        rows = item.placeholder.length
        self._make_room(rows)
        self._rows[item.content_key] = rows
        self._num_rows += rows
        self.num_encodes += 1

    def _make_room(self, rows: int) -> None:
        for key in [key for key in self._rows if key not in self._num_pins]:
            if self._num_rows + rows <= self.max_rows:
                break
            self._drop(key)
        assert self._num_rows + rows <= self.max_rows, "take() without cut()"

    def _drop(self, key: str) -> None:
        self._num_rows -= self._rows.pop(key)
        self._untaken.discard(key)
        self._evict.append(key)

    def _unpin(self, sequence: Sequence, up_to: int | None) -> None:
        kept: list[Item] = []
        for item in self._pinned_by.pop(sequence, ()):
            if up_to is not None and item.placeholder.end > up_to:
                kept.append(item)
                continue
            self._unpin_key(item.content_key)
        if kept:
            self._pinned_by[sequence] = kept

    def _unpin_key(self, key: str) -> None:
        self._num_pins[key] -= 1
        if not self._num_pins[key]:
            del self._num_pins[key]
