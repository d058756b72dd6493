"""Which items' tensors the engine process has: sent once, then named by content key.

The front decides, the engine obeys. Messages arrive in the order in which they were sent, so the
two never differ: whatever the front believes to be there is there when its message is read.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple


class Sending(NamedTuple):
    """How one item goes to the engine."""

    known: bool  # the engine has its tensors: they need not be sent
    keep: bool  # the engine is to keep them
    forget: list[str]  # content keys to drop before


class SentTensors:
    """The front's list of what it had the engine keep: up to `max_bytes`, 0 for nothing.

    The least recently used give way.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_queries = 0
        self.num_hits = 0  # items whose tensors weren't sent
        self.num_bytes = 0
        self._sizes: OrderedDict[str, int] = OrderedDict()  # oldest use first
        self._forget: list[str] = []  # not yet told

    def send(self, key: str, num_bytes: int) -> Sending:
        """Plan to send an item with tensors of this size. It must be sent as planned, and next."""
        self.num_queries += 1
        if key in self._sizes:
            self.num_hits += 1
            self._sizes.move_to_end(key)
            return Sending(True, False, self._take_forgotten())
        keep = num_bytes <= self.max_bytes and self.max_bytes > 0
        if keep:
            while self.num_bytes + num_bytes > self.max_bytes:
                self.drop(next(iter(self._sizes)))
            self._sizes[key] = num_bytes
            self.num_bytes += num_bytes
        return Sending(False, keep, self._take_forgotten())

    def drop(self, key: str) -> None:
        """Keep an item no longer, if it is kept: the engine hears of it with the next one sent."""
        size = self._sizes.pop(key, None)
        if size is not None:
            self.num_bytes -= size
            self._forget.append(key)

    def _take_forgotten(self) -> list[str]:
        forgotten, self._forget = self._forget, []
        return forgotten
