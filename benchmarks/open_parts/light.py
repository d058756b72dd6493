"""One streamed request on a connection of its own, with as little work as can be.

Whoever offers ten times what a server can do beside it on the same cores must not be the one who
is too slow: httpx takes about as long to send a request as the server to refuse it, and to read an
event as the server to make it. What is measured has the shape of `engine bench`.
"""

from __future__ import annotations

import asyncio
import re
import time

import httpx

from mm_engine.cli.bench.client import Failure, Measured, message_of

NO_RETRY_AFTER = "no Retry-After"  # the kind of failure of a refusal without it
_STATUS = re.compile(rb"HTTP/1\.1 (\d{3}) ")
_TOKENS = re.compile(rb'"completion_tokens":(\d+)')
_RETRY_AFTER = re.compile(rb"\r\nretry-after: \d+\r\n", re.IGNORECASE)
_END = b"data: [DONE]\n\n"
_LIMIT = 2**20


async def ask_lightly(url: httpx.URL, path: str, body: bytes, index: int = 0) -> Measured:
    """Send it and read to the end. Never raises for what the server does."""
    measured = Measured(index, begin=time.perf_counter())
    head = (
        f"POST {path} HTTP/1.1\r\nHost: {url.host}\r\nContent-Type: application/json\r\n"
        f"Connection: close\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection(url.host, url.port, limit=_LIMIT)
        writer.write(head.encode() + body)
        await _read(reader, measured)
    except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
        measured.failure = Failure(type(error).__name__, " ".join(str(error).split()))
    finally:
        if writer is not None:
            writer.close()
        measured.end = time.perf_counter()
    return measured


async def _read(reader: asyncio.StreamReader, measured: Measured) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    status = _STATUS.match(head)
    if status is None or status[1] != b"200":
        told = message_of((await reader.read()).decode("utf-8", "replace"))
        kind = status[1].decode() if status else "no HTTP"
        if kind in ("429", "503") and not _RETRY_AFTER.search(head):
            kind = NO_RETRY_AFTER
        measured.failure = Failure(kind, told)
        return
    last = b""
    while chunk := await reader.read(2**16):
        if measured.first_event is None and b"data: " in chunk:
            measured.first_event = time.perf_counter()
        last = last[-1024:] + chunk
    if b'"error":' in last:
        measured.failure = Failure("stream", "the stream broke off with an error")
    elif _END not in last:
        measured.failure = Failure("stream", "the stream was cut off before its end")
    tokens = _TOKENS.findall(last)
    measured.output_tokens = int(tokens[-1]) if tokens else 0
