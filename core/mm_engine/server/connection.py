"""Connections before their requests: how long one may take to say what it wants, and how many
there may be. What comes after a request's head is the application's to limit.
"""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import sys
from functools import partial
from typing import Any, cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mm_engine.server.errors import error_body

logger = logging.getLogger(__name__)

OTHER_FILES = 256  # descriptors of the process that are no connections of clients
LINGER_SECONDS = 1.0  # behind a refusal: closed at once, a client still sending may not see it
MAX_LINGERING = 64  # connections that do so at a time


class Limits:
    """What the connections of one server share. Used from the event loop's thread only."""

    def __init__(self, head_timeout: float, max_connections: int) -> None:
        """`head_timeout` is in seconds, from a connection's or a request's first sign."""
        self.head_timeout = head_timeout
        self.max_connections = max_connections
        #: Those between two requests, or before their first, since when: the longest come first.
        self.idle: dict[Connection, None] = {}
        self.num_lingering = 0

    def protocol(self) -> Any:
        """What uvicorn makes a connection with."""
        return partial(Connection, limits=self)


class Connection(H11Protocol):
    """uvicorn's connection, with limits and with errors in OpenAI's shape.

    One whose request's head isn't there in time is answered 408, or closed if it has sent nothing.
    One too many takes the place of the longest idle; if all have a request, it is answered 503.
    """

    def __init__(self, *args: Any, limits: Limits, **named: Any) -> None:
        super().__init__(*args, **named)
        self._limits = limits
        self._timer: asyncio.TimerHandle | None = None
        self._lingers = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for a request, if there is room for one more (called by asyncio)."""
        super().connection_made(cast(asyncio.Transport, transport))  # of a stream, as asyncio's are
        if len(self.connections) > self._limits.max_connections:
            longest = next(iter(self._limits.idle), None)
            if longest is None:
                self._refuse(503, "too many connections. Connect again later.", "overloaded_error")
                return
            longest.shut()
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it (called by asyncio)."""
        self._begin()
        self._limits.num_lingering -= self._lingers
        self._lingers = False
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take in what has come (called by asyncio)."""
        if self._lingers:
            return
        super().data_received(data)
        if self._timer is None and not self._has_request and not self.transport.is_closing():
            self._wait()  # a request has begun to come, or what is left of the last one

    def handle_events(self) -> None:
        """Act on what was taken in (called by uvicorn)."""
        super().handle_events()
        if self._has_request:
            self._begin()

    def on_response_complete(self) -> None:
        """Be idle (called by uvicorn); its own timer runs until something comes."""
        super().on_response_complete()
        if not self._has_request and not self.transport.is_closing():
            self._limits.idle[self] = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP (called by uvicorn, which handles h11's error)."""
        status = getattr(sys.exception(), "error_status_hint", 400)
        if status == 431:
            text = "the request's head is too large. Send fewer or shorter headers."
        else:
            text = "the request is not valid HTTP. Send another."
        self._refuse(status, text, "invalid_request_error")

    def shut(self) -> None:
        """Close it, though it may have sent part of a request."""
        self._begin()
        self.connections.discard(self)  # it counts until it is closed, which takes a moment
        self.transport.close()

    @property
    def _has_request(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _wait(self) -> None:
        self._limits.idle.setdefault(self)
        self._timer = self.loop.call_later(self._limits.head_timeout, self._give_up)

    def _begin(self) -> None:
        self._limits.idle.pop(self, None)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self.conn.trailing_data[0]:
            seconds = f"{self._limits.head_timeout:g} s"
            text = f"the request's head took longer than {seconds}. Send it faster."
            self._refuse(408, text, "invalid_request_error")
        else:
            self.shut()

    def _refuse(self, status: int, message: str, kind: str) -> None:
        """Answer for a request that isn't there, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            body = json.dumps(error_body(message, kind)).encode()
            headers = [
                ("Content-Type", "application/json"),
                ("Content-Length", str(len(body))),
                ("Connection", "close"),
                *([("Retry-After", "1")] if status == 503 else []),
            ]
            response = h11.Response(status_code=status, headers=headers)
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
            if self._limits.num_lingering < MAX_LINGERING and self.transport.can_write_eof():
                self._linger()
                return
        self.shut()

    def _linger(self) -> None:
        """Drop for a moment what still comes; the client sees the end of the answer."""
        self._begin()
        self._lingers = True
        self._limits.num_lingering += 1
        self.transport.write_eof()
        self.loop.call_later(LINGER_SECONDS, self.transport.close)


def room_for(num_connections: int) -> int:
    """How many connections the process may have, of these; it takes the descriptors it needs."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = num_connections + OTHER_FILES
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return num_connections
    if hard == resource.RLIM_INFINITY or hard > soft:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft < wanted:
        logger.warning("%d open files are allowed: fewer connections (ulimit -n)", soft)
    return min(num_connections, max(1, soft - OTHER_FILES))
