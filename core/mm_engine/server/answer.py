"""The engine's answer to the prompts of one HTTP request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from mm_engine.errors import EngineDead, MMEngineError
from mm_engine.outputs import RequestOutput
from mm_engine.request import Request

if TYPE_CHECKING:
    from mm_engine.engine.client import EngineClient


class News(NamedTuple):
    """What the engine told of one prompt."""

    prompt: int  # its index
    output: RequestOutput
    came: float  # `time.perf_counter()` when it came, however late it is read here


class Answer:
    """Iterates over the `News` of all prompts, as they come.

    An async context manager: the engine works on the requests inside it, and on leaving it those
    that haven't finished are aborted. If one fails, its error is raised and all are.
    """

    def __init__(
        self,
        client: EngineClient,
        requests: Sequence[Request],
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        """`begun` is called when the first news comes."""
        self._client = client
        self._begun: Callable[[], None] | None = begun
        self._requests = requests
        self._news: asyncio.Queue[News | int | Exception] = asyncio.Queue()
        self._next: int | Exception | None = None  # taken from the queue, but not yet told
        self._readers: list[asyncio.Task[None]] = []
        self._num_unfinished = len(requests)

    async def __aenter__(self) -> Answer:
        self._readers = [
            asyncio.create_task(self._read(index, request))
            for index, request in enumerate(self._requests)
        ]
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> News:
        """What is new.

        Raises:
            MMEngineError: the engine failed a request, or `fail` was called.
        """
        while self._num_unfinished:
            news = self._next if self._next is not None else await self._news.get()
            self._next = None
            if isinstance(news, Exception):
                raise news
            if isinstance(news, News):
                if self._begun is not None:
                    self._begun()
                    self._begun = None
                return news
            self._num_unfinished -= 1
        raise StopAsyncIteration

    def waiting(self) -> Iterator[News]:
        """What has come besides, for whom reads more slowly than the engine tells."""
        while self._next is None and not self._news.empty():
            news = self._news.get_nowait()
            if isinstance(news, News):
                yield news
            else:
                self._next = news

    def fail(self, error: MMEngineError) -> None:
        """End the answer with an error, whatever the engine still has to say."""
        self._news.put_nowait(error)

    async def _read(self, index: int, request: Request) -> None:
        finished = False
        try:
            async with contextlib.aclosing(self._client.generate(request)) as outputs:
                async for output in outputs:
                    finished = output.finished
                    self._news.put_nowait(News(index, output, time.perf_counter()))
        except Exception as error:  # whatever it is, the request's own task must get to know it
            self._news.put_nowait(error)
            return
        if not finished:
            self.fail(EngineDead("the engine has stopped. Restart the server."))
        self._news.put_nowait(index)
