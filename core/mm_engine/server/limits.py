"""What stands before every route: a limit to the size of a body."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_engine.errors import RequestError
from mm_engine.server.errors import error_response, note_error

LINGER_BYTES = 64 * 2**20  # of a body that is over the cap: read and dropped, not kept
LINGER_SECONDS = 5.0


class BodyLimit:
    """Answers 413 to a body over `max_bytes`, whether or not its length was announced."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self.app = app
        self.max_bytes = max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; it sees at most `max_bytes` of a body, then a `RequestError`."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        announced = headers.get("content-length", "")
        if announced.isdecimal() and (len(announced) > 18 or int(announced) > self.max_bytes):
            if "expect" not in headers:  # else the client waits for a go-ahead and has sent nothing
                await _linger(receive)
            error = self._error()
            note_error(scope, error)
            await error_response(error)(scope, receive, send)
            return
        num_bytes = 0

        async def counted_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            if message["type"] == "http.request":
                num_bytes += len(message.get("body", b""))
                if num_bytes > self.max_bytes:
                    if message.get("more_body"):
                        await _linger(receive)
                    raise self._error()
            return message

        await self.app(scope, counted_receive, send)

    def _error(self) -> RequestError:
        return RequestError(
            f"the body is over {self.max_bytes} bytes. Send smaller or fewer images.", status=413
        )


async def _linger(receive: Receive) -> None:
    """Read on for a while and drop it: a client still sending would miss an early answer."""
    num_bytes = 0
    try:
        async with asyncio.timeout(LINGER_SECONDS):
            while num_bytes < LINGER_BYTES:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body"):
                    return
                num_bytes += len(message.get("body", b""))
    except TimeoutError:
        return
