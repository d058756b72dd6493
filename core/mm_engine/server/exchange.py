"""One completion request from its body to its last byte. What it holds is released on leaving.

Everything that can be refused is refused before the headers of a stream are sent: they wait for
the engine's first output. A client that goes away ends the work, wherever it is.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Response
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from mm_engine.errors import RequestError
from mm_engine.outputs import RequestOutput
from mm_engine.request import Request
from mm_engine.server.answer import Answer
from mm_engine.server.errors import body_of
from mm_engine.server.protocol import RequestT, parse
from mm_engine.server.service import Service, Slots
from mm_engine.server.tally import Tally

CLIENT_GONE = 499  # nginx's status for the log; nobody receives it
_SMALL_BODY = 2**18  # bytes; a larger one is parsed in a thread
_EVENT_STREAM = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would collect events
]


class Reply(Protocol):
    """How an endpoint tells an answer: as events, or whole."""

    def opening(self) -> Iterable[BaseModel]:
        """Events before the first output."""

    def events(self, prompt: int, output: RequestOutput) -> Iterable[BaseModel]:
        """Events that tell what is new for the prompt of this index."""

    def closing(self, tally: Tally) -> Iterable[BaseModel]:
        """Events after the last output."""

    def whole(self, outputs: list[RequestOutput], tally: Tally) -> BaseModel:
        """The body of an answer that isn't streamed; one output for each prompt."""


@dataclass(frozen=True, slots=True)
class Job:
    """What an endpoint made of a body: requests for the engine, one for each prompt."""

    requests: list[Request]
    reply: Reply
    stream: bool


Endpoint = Callable[[Service, bytes, Slots], Awaitable[Job]]


async def parsed(service: Service, shape: type[RequestT], body: bytes) -> RequestT:
    """Read a body without holding up the event loop.

    Raises:
        RequestError: it isn't of this shape.
    """
    if len(body) < _SMALL_BODY:
        return parse(shape, body)
    return await service.in_thread(lambda: parse(shape, body))


class Exchange(Response):
    """A response that does its work when it is sent."""

    def __init__(self, service: Service, endpoint: Endpoint) -> None:
        super().__init__()
        self._service = service
        self._endpoint = endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit, read, answer.

        Raises:
            MMEngineError: before the response has started.
        """
        arrived = time.perf_counter()
        notes: dict[str, Any] = scope.setdefault("mm_engine.notes", {})
        metrics = self._service.metrics
        with self._service.admit() as slots, metrics.in_flight.track_inprogress():
            body = await read_body(receive, self._service.settings.body_timeout)
            if body is None or not await _unless_gone(
                receive, self._answer(body, slots, send, arrived, notes)
            ):
                notes["status"] = CLIENT_GONE
                return
        metrics.request_seconds.observe(time.perf_counter() - arrived)

    async def _answer(
        self, body: bytes, slots: Slots, send: Send, arrived: float, notes: dict[str, Any]
    ) -> None:
        job = await self._endpoint(self._service, body, slots)
        tally = notes["tally"] = Tally(job.requests, self._service.metrics, arrived)
        notes["submitted"] = time.perf_counter()
        answer = Answer(self._service.client, job.requests)
        try:
            with self._service.answering(answer):
                async with answer:
                    if job.stream:
                        await _stream(answer, job.reply, tally, send, notes)
                    else:
                        await _whole(answer, job, tally, send)
        except Exception as error:
            tally.fail(error)
            raise
        finally:
            tally.close("abort")  # what hasn't ended by now: the client has left


async def _whole(answer: Answer, job: Job, tally: Tally, send: Send) -> None:
    outputs = [RequestOutput(request.request_id) for request in job.requests]
    async for news in answer:
        tally.add(news)
        outputs[news.prompt].extend(news.output)
    body = job.reply.whole(outputs, tally).model_dump_json(exclude_unset=True).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(
    answer: Answer, reply: Reply, tally: Tally, send: Send, notes: dict[str, Any]
) -> None:
    news = await anext(answer)  # or the error that decides the status
    tally.add(news)
    await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
    try:
        await _emit(send, reply.opening())
        await _emit(send, reply.events(news.prompt, news.output))
        async for news in answer:
            tally.add(news)
            await _emit(send, reply.events(news.prompt, news.output))
        await _emit(send, reply.closing(tally))
        last = b"data: [DONE]\n\n"
    except Exception as error:  # the status is out: the stream has to say it
        status, body = body_of(error)
        notes["failed"], notes["error"] = status, error
        tally.fail(error)
        last = b"data: " + json.dumps(body).encode("ascii") + b"\n\n"
    await send({"type": "http.response.body", "body": last})


async def _emit(send: Send, events: Iterable[BaseModel]) -> None:
    lines = [f"data: {event.model_dump_json(exclude_unset=True)}\n\n" for event in events]
    if lines:
        body = "".join(lines).encode()
        await send({"type": "http.response.body", "body": body, "more_body": True})


async def read_body(receive: Receive, timeout: float) -> bytes | None:
    """The whole body, or None if the client has gone.

    Raises:
        RequestError: 413, or 408 if it takes longer than `timeout` seconds.
    """
    chunks: list[bytes] = []
    try:
        async with asyncio.timeout(timeout):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                chunks.append(message.get("body", b""))
                if not message.get("more_body"):
                    return b"".join(chunks)
    except TimeoutError:
        raise RequestError(
            f"the body took longer than {timeout:g} s. Send it faster, or smaller.", status=408
        ) from None


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
    """Do the work, or end it once the client has gone; returns whether it was done."""
    working = asyncio.create_task(work)
    leaving = asyncio.create_task(_left(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            return False
        await working
        return True
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
