"""The engine's answer to the prompts of one HTTP request."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple

from mm_engine.errors import MMEngineError
from mm_engine.outputs import RequestOutput
from mm_engine.request import Request

if TYPE_CHECKING:
    from mm_engine.engine.client import EngineClient, Told


class News(NamedTuple):
    """What the engine told of one prompt."""

    prompt: int  # its index
    output: RequestOutput
    came: float  # `time.perf_counter()` when it came, however late it is read here


class Answer:
    """Iterates over the `News` of all prompts, as they come.

    A context manager: the engine works on the requests inside it, and on leaving it those that
    haven't finished are aborted. If one fails, its error is raised and all are.
    """

    def __init__(
        self,
        client: EngineClient,
        requests: Sequence[Request],
        begun: Callable[[], None] = lambda: None,
    ) -> None:
        """`begun` is called when the first news is read."""
        self._client = client
        self._begun: Callable[[], None] | None = begun
        self._requests = requests
        self._news: deque[News | MMEngineError] = deque()  # an error is the last that is read
        self._num_unfinished = len(requests)
        self._reader: asyncio.Future[None] | None = None  # waits for news

    def __enter__(self) -> Answer:
        """Begin.

        Raises:
            EngineDead: the engine is gone.
        """
        for index, request in enumerate(self._requests):
            try:
                self._client.submit(request, partial(self._told, index))
            except BaseException:
                self._abort(self._requests[:index])
                raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._abort(self._requests)

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> News:
        """What is new.

        Raises:
            MMEngineError: the engine failed a request, or `fail` was called.
        """
        while not self._news:
            if not self._num_unfinished:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        news = self._news.popleft()
        if isinstance(news, MMEngineError):
            raise news
        if self._begun is not None:
            self._begun()
            self._begun = None
        return news

    def waiting(self) -> Iterator[News]:
        """What has come besides, for whom reads more slowly than the engine tells."""
        while self._news:
            news = self._news[0]
            if isinstance(news, MMEngineError):
                return
            self._news.popleft()
            yield news

    def fail(self, error: MMEngineError) -> None:
        """End the answer with an error, unless the engine has said all of it."""
        if not self._num_unfinished:
            return
        self._news.append(error)
        self._wake()

    def _told(self, index: int, told: Told) -> None:
        if isinstance(told, MMEngineError):
            self.fail(told)
            return
        self._news.append(News(index, told, time.perf_counter()))
        self._num_unfinished -= told.finished
        self._wake()

    def _wake(self) -> None:
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _abort(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._client.abort(request.request_id)
