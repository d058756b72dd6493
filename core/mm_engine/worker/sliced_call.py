"""A call that is made in slices of time: encoding an image between two steps' decodes."""

from __future__ import annotations

import enum
import threading
import time
from collections.abc import Callable
from typing import Any

from torch import nn


class _State(enum.Enum):
    RESTING = enum.auto()
    RUNNING = enum.auto()
    ENDED = enum.auto()


class Cancelled(BaseException):
    """Ends a call that nobody waits for; no `Exception`, so that a plugin lets it pass."""


class SlicedCall:
    """Calls `call` in a thread of its own, for as long at a time as it is told.

    It can rest wherever one of `modules` has computed its output, so a slice is as fine as the
    modules are: give it leaves. The caller waits while the thread runs, so that never more than
    one of them computes. The thread is a daemon: an engine that ends doesn't wait for it.

    Raises:
        RuntimeError: no thread can be started.
    """

    def __init__(self, call: Callable[[], None], modules: list[nn.Module]) -> None:
        self._call = call
        self._modules = modules
        self._state = _State.RESTING
        self._changed = threading.Condition()
        self._began = self._seconds = 0.0  # of the slice
        self._longest = 0.0  # seconds between two places to rest
        self._last = 0.0  # when the last was passed
        self._cancelled = False
        self.error: BaseException | None = None  # what the call raised
        self._thread = threading.Thread(target=self._run, name="sliced-call", daemon=True)
        self._thread.start()

    @property
    def ended(self) -> bool:
        """Whether the call has returned, or raised."""
        return self._state is _State.ENDED

    def run(self, seconds: float = float("inf")) -> None:
        """Let the call go on for about `seconds`, or to its end."""
        with self._changed:
            # Left early by Ctrl-C, the thread may still be running: it gets this time instead.
            self._began, self._seconds = time.perf_counter(), seconds
            if self._state is _State.RESTING:
                self._last = self._began
                self._state = _State.RUNNING
                self._changed.notify_all()
            self._changed.wait_for(lambda: self._state is not _State.RUNNING)

    def cancel(self) -> None:
        """End the call where it rests: there it raises, and unwinds."""
        self._cancelled = True
        while not self.ended:  # it may just be about to rest once more
            self.run()

    def _run(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._state is _State.RUNNING)
        own = threading.get_ident()

        def place_to_rest(module: nn.Module, inputs: Any, output: Any) -> None:
            if threading.get_ident() == own:  # others may be computing with these modules too
                self._maybe_rest()

        handles = []
        try:
            if not self._cancelled:
                for module in self._modules:
                    handles.append(module.register_forward_hook(place_to_rest))
                self._call()
        except BaseException as error:
            self.error = error
        finally:
            for handle in handles:
                handle.remove()
        with self._changed:
            self._state = _State.ENDED
            self._changed.notify_all()

    def _maybe_rest(self) -> None:
        now = time.perf_counter()
        self._longest = max(self._longest, now - self._last)
        self._last = now
        # Rest where the end of the slice is nearest: half of the next piece may lie behind it.
        if not self._cancelled and now - self._began + self._longest / 2 >= self._seconds:
            with self._changed:
                self._state = _State.RESTING
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._state is _State.RUNNING)
        if self._cancelled:
            raise Cancelled
