"""A stand-in for the engine's client, made from what it generates for each request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from mm_engine.errors import MMEngineError
from mm_engine.outputs import RequestOutput
from mm_engine.request import Request


class Submitting:
    """`submit` and `abort` as `EngineClient` has them; a subclass has `generate`."""

    def __init__(self) -> None:
        self._asked: dict[str, asyncio.Task[None]] = {}
        self.aborted: list[str] = []  # before they had ended

    def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        raise NotImplementedError

    def submit(
        self, request: Request, tell: Callable[[RequestOutput | MMEngineError], None]
    ) -> None:
        self._asked[request.request_id] = asyncio.create_task(self._tell(request, tell))

    def abort(self, request_id: str) -> None:
        task = self._asked.pop(request_id, None)
        if task is not None:
            task.cancel()
            self.aborted.append(request_id)

    async def _tell(
        self, request: Request, tell: Callable[[RequestOutput | MMEngineError], None]
    ) -> None:
        try:
            async for output in self.generate(request):
                if output.finished:
                    del self._asked[request.request_id]
                tell(output)
        except Exception as error:
            del self._asked[request.request_id]
            known = isinstance(error, MMEngineError)
            tell(error if known else MMEngineError(f"the test's own fault: {error!r}"))
