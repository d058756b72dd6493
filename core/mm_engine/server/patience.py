"""How long a client may take to read what it is sent."""

from __future__ import annotations

import asyncio
from types import TracebackType

from starlette.types import Message, Send


class Stalled(BaseException):
    """The client doesn't read what it is sent. No `Exception`: it can't be told of it."""


class Patience:
    """`send`, for a client that reads within `timeout` seconds what the buffers don't hold.

    An async context manager, which ends what is done inside. A stream sends many times and hardly
    ever waits: a timer for each would cost more than the look that one timer takes now and then.
    """

    def __init__(self, send: Send, timeout: float) -> None:
        self._send = send
        self._timeout = timeout
        self._since: float | None = None  # by the loop's clock, of what is being sent
        self._loop = asyncio.get_running_loop()
        self._clock = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None

    async def send(self, message: Message) -> None:
        """Send it, or be cancelled."""
        self._since = self._loop.time()
        try:
            await self._send(message)
        finally:
            self._since = None

    async def __aenter__(self) -> Patience:
        await self._clock.__aenter__()
        self._timer = self._loop.call_later(self._timeout, self._look)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop looking.

        Raises:
            Stalled: the client took too long.
        """
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._clock.__aexit__(kind, error, traceback)
        except TimeoutError:
            if self._clock.expired():
                raise Stalled from None
            raise

    def _look(self) -> None:
        now = self._loop.time()
        over = (self._since if self._since is not None else now) + self._timeout
        if over <= now:
            self._clock.reschedule(now)
        else:
            self._timer = self._loop.call_at(over, self._look)
