"""One streamed request on a connection of its own, with as little work as can be.

Whoever offers ten times what a server can do beside it on the same cores must not be the one who
is too slow: httpx takes about as long to send a request as the server to refuse it, and to read an
event as the server to make it. What is measured has the shape of `engine bench`.
"""

from __future__ import annotations

import asyncio
import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx

from mm_engine.cli.bench.client import Failure, Measured, message_of

NO_RETRY_AFTER = "no Retry-After"  # the kind of failure of a refusal without it
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_RETRY_AFTER = re.compile(rb"\r\nretry-after: \d+\r\n", re.IGNORECASE)
_END = b"data: [DONE]\n\n"
_KEPT = 1024  # bytes of what came before, beside the newest
_MAX_HEAD = 2**16


@contextmanager
def unpaused() -> Iterator[None]:
    """Have this process look for garbage among new objects alone: to go through all that is
    imported stops it for a quarter of a second, which would be taken for the server's."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


async def ask_lightly(url: httpx.URL, path: str, body: bytes, index: int = 0) -> Measured:
    """Send it and read to the end. Never raises for what the server does."""
    measured = Measured(index, begin=time.perf_counter())
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    loop = asyncio.get_running_loop()
    transport: asyncio.Transport | None = None
    try:
        transport, reader = await loop.create_connection(
            lambda: _Reader(measured, loop.create_future()), url.host, url.port
        )
        transport.write(head.encode() + body)
        await reader.ended
        reader.judge()
    except OSError as error:
        measured.failure = Failure(type(error).__name__, " ".join(str(error).split()))
    finally:
        if transport is not None:
            transport.close()
        measured.end = time.perf_counter()
    return measured


class _Reader(asyncio.Protocol):
    """Takes what comes where it comes: no task wakes before the connection's end.

    Of a stream the last bytes are kept, of anything else all.
    """

    def __init__(self, measured: Measured, ended: asyncio.Future[None]) -> None:
        self.ended = ended
        self._measured = measured
        self._head = b""
        self._status = ""  # once the head has come
        self._body = b""

    def data_received(self, data: bytes) -> None:
        """Take it (called by asyncio)."""
        if not self._status:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                if len(self._head) > _MAX_HEAD and not self.ended.done():
                    self.ended.set_exception(OSError("the head has no end"))
                return
            data = self._head[end + 4 :]
            self._head = self._head[: end + 4]
            status = _STATUS.match(self._head)
            self._status = status[1].decode() if status else "no HTTP"
        streams = self._status == "200"
        if streams and self._measured.first_event is None and b"data: " in data:
            self._measured.first_event = time.perf_counter()
        self._body = (self._body[-_KEPT:] if streams else self._body) + data

    def connection_lost(self, exc: Exception | None) -> None:
        """Say that it has ended (called by asyncio)."""
        if self.ended.done():
            return
        if exc is None:
            self.ended.set_result(None)
        else:
            self.ended.set_exception(exc)

    def judge(self) -> None:
        """What became of the request, once all has come."""
        measured, body = self._measured, self._body
        if self._status != "200":
            told = message_of(body.decode("utf-8", "replace"))
            kind = self._status or "no answer"
            if kind in ("429", "503") and not _RETRY_AFTER.search(self._head):
                kind = NO_RETRY_AFTER
            measured.failure = Failure(kind, told)
            return
        if b'"error":' in body:
            measured.failure = Failure("stream", "the stream broke off with an error")
        elif _END not in body:
            measured.failure = Failure("stream", "the stream was cut off before its end")
        tokens = _TOKENS.findall(body)
        measured.output_tokens = int(tokens[-1]) if tokens else 0
