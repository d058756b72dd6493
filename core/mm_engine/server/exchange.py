"""One completion request from its body to its last byte. What it holds is released on leaving.

Everything that can be refused is refused before the headers of a stream are sent: they wait for
the engine's first output. A client that goes away ends the work, wherever it is.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from fastapi import Response
from pydantic import TypeAdapter
from starlette.types import Receive, Scope, Send

from mm_engine.errors import RequestError
from mm_engine.outputs import RequestOutput
from mm_engine.request import Request
from mm_engine.server.answer import Answer, News
from mm_engine.server.deadline import Deadline, asked_in_header
from mm_engine.server.errors import body_of
from mm_engine.server.patience import Patience, Stalled
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


_JSON: TypeAdapter[Any] = TypeAdapter(Any)
Body = Mapping[str, object]  # what JSON says of an answer, or of a part of it


class Reply(Protocol):
    """How an endpoint tells an answer: as events, or whole."""

    def opening(self) -> Iterable[Body]:
        """Events before the first output."""

    def events(self, prompt: int, output: RequestOutput) -> Iterable[Body]:
        """Events that tell what is new for the prompt of this index."""

    def closing(self, tally: Tally) -> Iterable[Body]:
        """Events after the last output."""

    def whole(self, outputs: list[RequestOutput], tally: Tally) -> Body:
        """The body of an answer that isn't streamed; one output for each prompt."""


def done_or_error(error: dict[str, Any] | None) -> bytes:
    """How a stream ends: with OpenAI's mark, or with the body of the error that cut it off."""
    return b"data: [DONE]\n\n" if error is None else b"data: %b\n\n" % json.dumps(error).encode()


@dataclass(frozen=True, slots=True)
class Job:
    """What an endpoint made of a body: requests for the engine, one for each prompt."""

    requests: list[Request]
    reply: Reply
    stream: bool
    timeout: float | None = None  # seconds from the request's arrival, as its body asks
    #: The last lines of a stream, behind all of the reply's events; given an error, they tell it.
    ending: Callable[[dict[str, Any] | None], bytes] = done_or_error
    #: The error to tell for one that came from the engine: the request may have brought it about.
    blame: Callable[[Exception], Exception] = lambda error: error


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
        arrived, began = time.perf_counter(), asyncio.get_running_loop().time()
        notes: dict[str, Any] = scope.setdefault("mm_engine.notes", {})
        service, metrics = self._service, self._service.metrics
        with service.admit() as slots, metrics.in_flight.track_inprogress():
            slots.wait()
            deadline = Deadline(began, service.settings.max_request_seconds)
            deadline.allow(asked_in_header(scope))
            async with deadline.raising():
                body = await read_body(receive, service.settings.body_timeout)
            work = self._answer(body or b"", slots, send, arrived, deadline, notes)
            try:
                done = body is not None and await unless_gone(receive, work)
            except Stalled:
                done = False
            finally:
                work.close()  # if it wasn't begun
            if not done:
                notes["status"] = CLIENT_GONE
                return
        metrics.request_seconds.observe(time.perf_counter() - arrived)

    async def _answer(
        self,
        body: bytes,
        slots: Slots,
        send: Send,
        arrived: float,
        deadline: Deadline,
        notes: dict[str, Any],
    ) -> None:
        async with deadline.raising():
            job = await self._endpoint(self._service, body, slots)
        deadline.allow(job.timeout)
        slots.take_tokens(job.requests)
        tally = notes["tally"] = Tally(job.requests, self._service.metrics, arrived)
        notes["submitted"] = time.perf_counter()
        answer = Answer(self._service.client, job.requests, slots.begun)
        patience = Patience(send, self._service.settings.send_timeout)
        try:
            with self._service.answering(answer), deadline.ending(answer), answer:
                async with patience:
                    if job.stream:
                        await _stream(answer, job, tally, patience.send, slots, notes)
                    else:
                        await _whole(answer, job, tally, patience.send, slots)
        except Exception as error:
            told = job.blame(error)
            tally.fail(told)
            if told is error:
                raise
            raise told from error
        finally:
            tally.close("abort")  # what hasn't ended by now: the client has left


async def _whole(answer: Answer, job: Job, tally: Tally, send: Send, slots: Slots) -> None:
    outputs = [RequestOutput(request.request_id) for request in job.requests]
    async for news in answer:
        tally.add(news)
        outputs[news.prompt].extend(news.output)
    body = _json(job.reply.whole(outputs, tally))
    slots.give_back()
    await send_json(send, body)


async def send_json(send: Send, body: bytes) -> None:
    """Send a whole answer."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(
    answer: Answer, job: Job, tally: Tally, send: Send, slots: Slots, notes: dict[str, Any]
) -> None:
    reply = job.reply
    news = await anext(answer)  # or the error that decides the status
    tally.add(news)
    await send({"type": "http.response.start", "status": 200, "headers": _EVENT_STREAM})
    try:
        await _emit(send, (*reply.opening(), *reply.events(news.prompt, news.output)))
        async for first in answer:
            for prompt, output in _together(first, answer, tally):
                await _emit(send, reply.events(prompt, output))
        last = b"".join(map(event_lines, reply.closing(tally))) + job.ending(None)
    except Exception as error:  # the status is out: the stream has to say it
        told = job.blame(error)
        status, body = body_of(told)
        notes["failed"], notes["error"] = status, told
        tally.fail(told)
        last = job.ending(body)
    slots.give_back()
    await send({"type": "http.response.body", "body": last})


def _together(first: News, answer: Answer, tally: Tally) -> Iterable[tuple[int, RequestOutput]]:
    """What is new of each prompt, as one: more than the engine told at a time if this process, or
    the client, can't keep pace with it. Then events grow longer instead of late."""
    tally.add(first)
    outputs = {first.prompt: first.output}
    for news in answer.waiting():
        tally.add(news)
        if news.prompt in outputs:
            outputs[news.prompt].extend(news.output)
        else:
            outputs[news.prompt] = news.output
    return outputs.items()


async def _emit(send: Send, events: Iterable[Body]) -> None:
    body = b"".join(map(event_lines, events))
    if body:
        await send({"type": "http.response.body", "body": body, "more_body": True})


def event_lines(event: Body) -> bytes:
    """An event as server-sent events write it. If it has a type, that is its name."""
    kind = event.get("type")
    name = b"" if kind is None else b"event: %b\n" % str(kind).encode()
    return b"%bdata: %b\n\n" % (name, _json(event))


def _json(body: Body) -> bytes:
    return _JSON.dump_json(body, exclude_unset=True)  # of what a request said itself


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


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
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
