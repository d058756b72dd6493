"""How long a request may take, as its client or the server has it."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Iterator

from starlette.types import Scope

from mm_engine.errors import DeadlineExceeded, RequestError
from mm_engine.server.answer import Answer

HEADER = "X-Request-Timeout"  # seconds


def asked_in_header(scope: Scope) -> float | None:
    """The seconds that a request allows itself; None if it doesn't say.

    Raises:
        RequestError: the header holds no positive number.
    """
    name = HEADER.lower().encode("ascii")
    given = next((value for key, value in scope.get("headers", ()) if key == name), None)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = 0.0
    if not (math.isfinite(seconds) and seconds > 0):
        raise RequestError(f"{HEADER} must be a number of seconds above 0.", param=HEADER)
    return seconds


class Deadline:
    """When a request's time is over: the earliest of all that limit it."""

    def __init__(self, began: float, seconds: float | None) -> None:
        """`began` is by the event loop's clock; None is no limit."""
        self._began = began
        self._seconds = seconds

    def allow(self, seconds: float | None) -> None:
        """Let it take at most so long; None changes nothing."""
        if seconds is not None:
            self._seconds = seconds if self._seconds is None else min(self._seconds, seconds)

    @contextlib.asynccontextmanager
    async def raising(self) -> AsyncIterator[None]:
        """End what is done inside when time is over.

        Raises:
            DeadlineExceeded: it is.
        """
        try:
            async with asyncio.timeout_at(self._when) as clock:
                yield
        except TimeoutError:
            if clock.expired():
                raise self._over() from None
            raise

    @contextlib.contextmanager
    def ending(self, answer: Answer) -> Iterator[None]:
        """End an answer, with an error that can still be told, when time is over."""
        if self._when is None:
            yield
            return
        loop = asyncio.get_running_loop()
        timer = loop.call_at(self._when, lambda: answer.fail(self._over()))
        try:
            yield
        finally:
            timer.cancel()

    @property
    def _when(self) -> float | None:
        return None if self._seconds is None else self._began + self._seconds

    def _over(self) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"the request's time is over: {self._seconds:g} s. Ask for a shorter answer, or allow "
            "more time."
        )
