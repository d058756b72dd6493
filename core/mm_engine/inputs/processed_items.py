"""Tensors of items that were mapped before, so that a known image isn't mapped again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock

from torch import Tensor

Tensors = dict[str, Tensor]


class ProcessedItems:
    """What the mapper made of each item, by content key; up to `max_bytes`, 0 for none.

    The least recently used go first. Threads may share it: an item that arrives again while it is
    being mapped is waited for, and what the mapper raised for it is raised for both. Everybody
    gets tensors of their own, so that a hook which writes to its own spoils nobody else's.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.num_queries = 0
        self.num_hits = 0  # items that weren't mapped
        self.num_bytes = 0
        self._kept: OrderedDict[str, Tensors] = OrderedDict()  # oldest use first
        self._making: dict[str, Future[Tensors]] = {}
        self._lock = Lock()

    def get(self, key: str, make: Callable[[], Tensors]) -> Tensors:
        """The tensors of the item with this content key; `make()` maps it if need be.

        Raises:
            Whatever `make` raises.
        """
        if not self.max_bytes:
            return make()
        with self._lock:
            self.num_queries += 1
            kept, coming = self._kept.get(key), self._making.get(key)
            if kept is not None:
                self._kept.move_to_end(key)
            elif coming is None:
                self._making[key] = mine = Future[Tensors]()
            self.num_hits += kept is not None or coming is not None
        if kept is not None:
            return _copy(kept)
        if coming is not None:
            return _copy(coming.result())
        try:
            made = make()
        except BaseException as error:
            with self._lock:
                del self._making[key]
            mine.set_exception(error)
            raise
        own = _copy(made)
        with self._lock:
            del self._making[key]
            self._keep(key, own)
        mine.set_result(own)
        return made

    def _keep(self, key: str, tensors: Tensors) -> None:
        size = num_bytes(tensors)
        if size > self.max_bytes:
            return
        self._kept[key] = tensors
        self.num_bytes += size
        while self.num_bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= num_bytes(oldest)


def num_bytes(tensors: Tensors) -> int:
    """The memory that an item's tensors take."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())


def _copy(tensors: Tensors) -> Tensors:
    return {name: tensor.clone() for name, tensor in tensors.items()}
