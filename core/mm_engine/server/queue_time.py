"""How long a request that comes now would wait for the first token of its answer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

NUM_BEGUN = 128  # requests whose beginnings the pace is taken from


class QueueTime:
    """Tells it by those before: how many wait, and at what pace they have begun lately.

    The pace is that of the last `NUM_BEGUN` first tokens, over the time in which somebody waited:
    hours without a request make it no slower. Used from the event loop's thread only.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_waiting = 0  # requests without a first token
        self._clock = clock
        self._waited = 0.0  # seconds in which somebody waited, up to
        self._counted = clock()
        self._begun: deque[float] = deque([0.0], maxlen=NUM_BEGUN + 1)  # `_waited` at each

    @property
    def seconds(self) -> float:
        """What a newcomer has to expect; 0 if nobody waits, or nothing is known yet."""
        num_begun = len(self._begun) - 1
        if not num_begun:
            return 0.0
        return self.num_waiting * (self._now() - self._begun[0]) / num_begun

    def join(self) -> None:
        """A request has come."""
        self._now()
        self.num_waiting += 1

    def begin(self) -> None:
        """One has its first token."""
        self._begun.append(self._now())
        self.num_waiting -= 1

    def leave(self) -> None:
        """One is gone without: it was refused, or its client has left."""
        self._now()
        self.num_waiting -= 1

    def _now(self) -> float:
        """Seconds so far in which somebody waited."""
        now = self._clock()
        if self.num_waiting:
            self._waited += now - self._counted
        self._counted = now
        return self._waited
