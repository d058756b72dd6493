"""The front's end of the engine process."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass

import zmq
import zmq.asyncio

from mm_engine.config import EngineConfig
from mm_engine.engine import wire
from mm_engine.engine.launch import Launch
from mm_engine.engine.sent_tensors import SentTensors
from mm_engine.engine.status import EngineInfo, EngineStats
from mm_engine.errors import (
    ERRORS_BY_NAME,
    EngineDead,
    MMEngineError,
    RequestError,
    StartupError,
)
from mm_engine.outputs import ErrorInfo, RequestOutput
from mm_engine.plugins.record import PluginRecord
from mm_engine.processes import how_it_ended
from mm_engine.request import Request

Told = RequestOutput | MMEngineError  # what is new of a request, or the error that ended it

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.2  # how often the process is looked at
PING_SECONDS = 2.0  # how often an engine that is at work is asked for a sign of life
SHUTDOWN_SECONDS = 5.0  # how long it may take to end when asked


@dataclass(frozen=True, slots=True)
class _Asked:
    """A request that isn't answered yet."""

    request: Request
    tell: Callable[[Told], None]


class EngineClient:
    """An engine in a process of its own. Made by `start`, ended by `close`; for one event loop."""

    info: EngineInfo

    def __init__(self, config: EngineConfig, launch: Launch | None = None) -> None:
        #: Items whose tensors the process has.
        self.sent = SentTensors(config.mm_processor_cache_memory)
        self._step_timeout = config.step_timeout
        self._launch = launch or Launch()
        self._process = self._launch.process
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.bind(self._launch.address)
        self._asked: dict[str, _Asked] = {}
        self._stats: deque[tuple[float, asyncio.Future[EngineStats]]] = deque()  # since, for whom
        self._death: str | None = None  # how the engine ended
        self._last_words: str | None = None  # what it said about it
        self._tasks: list[asyncio.Task[None]] = []

    @classmethod
    async def start(
        cls,
        config: EngineConfig,
        profile_request: Request,
        plugin: PluginRecord | None = None,
        launch: Launch | None = None,
    ) -> EngineClient:
        """Start the process, unless `launch` has, and wait until the model is loaded.

        `plugin` is the record of the caller's own plugin: the process loads that one or none.

        Raises:
            StartupError, PluginError: it can't start as asked; nothing is left behind.
        """
        client = cls(config, launch)
        try:
            client.info = await client._shake_hands(config, profile_request, plugin)
        except BaseException:
            client._clean_up()
            raise
        client._tasks = [asyncio.create_task(client._read()), asyncio.create_task(client._watch())]
        return client

    @property
    def pid(self) -> int:
        """The engine process."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether the engine takes requests."""
        return self._death is None and self._process.poll() is None

    def submit(self, request: Request, tell: Callable[[Told], None]) -> None:
        """Have `request` answered. On the event loop `tell` gets each increment as it comes, the
        last of which is finished, or the error that ended it: after either it is called no more.
        It must not raise, nor wait.

        The request's id must be one that was never used before.

        Raises:
            RequestError: the id is in use.
            EngineDead: the process is gone.
        """
        if self._death is not None:
            raise self._dead()
        if request.request_id in self._asked:
            raise RequestError(
                f"request_id is in use: {request.request_id}. Choose another.", param="request_id"
            )
        tensors: list[wire.Frame] = []
        self._send(wire.Add(wire.pack_request(request, tensors, self.sent)), tensors)
        self._asked[request.request_id] = _Asked(request, tell)

    def abort(self, request_id: str) -> None:
        """Hear no more of this request, unless it has ended anyway."""
        if self._asked.pop(request_id, None) is not None and self._death is None:
            self._send(wire.Abort(request_id))

    async def generate(self, request: Request) -> AsyncGenerator[RequestOutput, None]:
        """Answer `request`, increment by increment. Leaving the iterator aborts the request.

        The request's id must be one that was never used before.

        Raises:
            RequestError, PluginError: the request failed.
            EngineDead: the process is gone.
        """
        told: asyncio.Queue[Told] = asyncio.Queue()
        self.submit(request, told.put_nowait)
        try:
            finished = False
            while not finished:
                news = await told.get()
                if isinstance(news, MMEngineError):
                    raise news
                finished = news.finished
                yield news
        finally:
            self.abort(request.request_id)

    async def stats(self) -> EngineStats:
        """How the engine is, between two steps.

        Raises:
            EngineDead: the process is gone.
        """
        if self._death is not None:
            raise self._dead()
        return await self._ask_stats()

    def _ask_stats(self) -> asyncio.Future[EngineStats]:
        future: asyncio.Future[EngineStats] = asyncio.get_running_loop().create_future()
        self._stats.append((time.monotonic(), future))
        self._send(wire.StatsRequest())
        return future

    async def close(self) -> None:
        """End the process: ask, wait, kill. What is still being answered gets `EngineDead`."""
        how = "it was closed"
        try:
            if self.alive:
                self._send(wire.Shutdown())
                async with asyncio.timeout(SHUTDOWN_SECONDS):
                    while self._process.poll() is None:
                        await asyncio.sleep(POLL_SECONDS / 10)
            elif self._process.poll() is not None:  # before anybody could close it
                how = self._last_words or how_it_ended(self._process)
        except TimeoutError:
            pass
        finally:
            self._die(how)
            for task in self._tasks:
                task.cancel()
            self._clean_up()

    async def _shake_hands(
        self, config: EngineConfig, profile_request: Request, plugin: PluginRecord | None
    ) -> EngineInfo:
        async def hand_over() -> wire.FromEngine:
            tensors: list[wire.Frame] = []
            packed = wire.pack_request(profile_request, tensors)
            await self._socket.send_multipart(
                wire.encode(wire.Start(config, packed, plugin), tensors), copy=False
            )
            return wire.decode_from_engine(await self._socket.recv_multipart())

        task = asyncio.create_task(hand_over())
        try:
            while not task.done():
                exited = self._process.poll() is not None
                await asyncio.wait((task,), timeout=POLL_SECONDS)
                if exited and not task.done():
                    raise StartupError(
                        f"the engine process ended while starting: {how_it_ended(self._process)}. "
                        "What it printed says why."
                    )
        finally:
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        message = task.result()
        if isinstance(message, wire.Failed):
            raise ERRORS_BY_NAME.get(message.name, StartupError)(message.message)
        assert isinstance(message, wire.Ready)
        return message.info

    def _send(self, message: wire.ToEngine, tensors: list[wire.Frame] | None = None) -> None:
        # The queue to the engine has no limit: this never waits, not even while being cancelled.
        self._socket.send_multipart(wire.encode(message, tensors or []), copy=False)

    async def _read(self) -> None:
        try:
            while True:
                self._dispatch(wire.decode_from_engine(await self._socket.recv_multipart()))
        except Exception:
            logger.exception("The engine can't be understood.")
            self._process.kill()  # and _watch tells everybody

    def _dispatch(self, message: wire.FromEngine) -> None:
        if isinstance(message, wire.Outputs):
            for output in message.outputs:
                self._tell(output)
        elif isinstance(message, wire.Failed):
            self._last_words = message.message
        elif isinstance(message, wire.Stats):
            _, future = self._stats.popleft()
            if not future.done():
                future.set_result(message.stats)

    def _tell(self, output: RequestOutput) -> None:
        asked = self._asked.get(output.request_id)
        if asked is None:  # the caller left before the engine knew
            return
        if output.error is not None:
            for item in asked.request.items:  # perhaps they are at fault
                self.sent.drop(item.content_key)
        if output.finished:  # as all with an error are
            del self._asked[output.request_id]
        asked.tell(output if output.error is None else _to_error(output.error))

    async def _watch(self) -> None:
        pinged = 0.0
        while self._process.poll() is None:
            await asyncio.sleep(POLL_SECONDS)
            now = time.monotonic()
            # It answers between steps, so the oldest question tells how long a step has taken.
            if self._stats and now - self._stats[0][0] > self._step_timeout:
                logger.error(
                    "the engine is stuck: a step takes longer than %g s (--step-timeout). It is "
                    "killed.",
                    self._step_timeout,
                )
                self._process.kill()
                self._die(f"a step took longer than {self._step_timeout:g} s")
                return
            if self._asked and not self._stats and now - pinged > PING_SECONDS:
                self._ask_stats()
                pinged = now
        await asyncio.sleep(POLL_SECONDS)  # for what it sent before
        self._die(self._last_words or how_it_ended(self._process))

    def _die(self, how: str) -> None:
        """Tell everybody who waits that nothing more will come."""
        if self._death is not None:
            return
        self._death = how
        for asked in self._asked.values():
            asked.tell(self._dead())
        self._asked.clear()
        for _, future in self._stats:
            if not future.done():
                future.set_exception(self._dead())
                future.exception()  # perhaps nobody waits for it: a ping
        self._stats.clear()

    def _dead(self) -> EngineDead:
        return EngineDead(f"the engine has stopped: {self._death}. Start it again.")

    def _clean_up(self) -> None:
        self._launch.end()
        self._socket.close(linger=0)
        self._context.term()


def _to_error(info: ErrorInfo) -> MMEngineError:
    if info.name == "RequestError":
        return RequestError(info.message, param=info.param)
    return ERRORS_BY_NAME.get(info.name, MMEngineError)(info.message)
