"""What the metrics say of whole exchanges, over a stand-in for the engine and its clock."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from types import SimpleNamespace
from typing import Any

import pytest

from mm_engine.errors import EngineDead, MMEngineError, Overloaded, PluginError, RequestError
from mm_engine.inputs.processed_items import ProcessedItems
from mm_engine.outputs import CompletionOutput, RequestOutput
from mm_engine.plugins.record import PluginRecord
from mm_engine.request import Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.server import answer, exchange
from mm_engine.server.completions import CompletionReply
from mm_engine.server.exchange import Exchange, Job
from mm_engine.server.metrics import REASONS
from mm_engine.server.service import Service, Slots
from mm_engine.server.settings import ServerSettings
from submitting import Submitting

REFUSED = RequestError("It exceeds something. Send less.")
SILENCE = "silence"  # nothing more comes


class Clock:
    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    for module in (answer, exchange):
        monkeypatch.setattr(module, "time", made)
    return made


class Scripted(Submitting):
    """Takes a second for each step of its scripts (one for each prompt): a token or an error."""

    alive = True

    def __init__(self, clock: Clock, *scripts: list[str | Exception]) -> None:
        super().__init__()
        self.clock = clock
        self.scripts = scripts
        self.quiet = asyncio.Event()  # one of the scripts is through

    async def generate(self, request: Request) -> AsyncIterator[RequestOutput]:
        for step in self.scripts[int(request.request_id)]:
            await asyncio.sleep(0)
            self.clock.now += 1
            if isinstance(step, Exception):
                raise step
            if step == SILENCE:
                self.quiet.set()
                await asyncio.Event().wait()
            reason = "stop" if step == "." else None
            completion = CompletionOutput(0, step, [5], finish_reason=reason)
            yield RequestOutput(request.request_id, [completion], finished=reason is not None)
        self.quiet.set()


class World:
    """A service over an engine with these scripts, and one client of it."""

    blame: Callable[[Exception], Exception] = staticmethod(lambda error: error)

    def __init__(self, clock: Clock, *scripts: list[str | Exception], stream: bool = False) -> None:
        self.engine = Scripted(clock, *scripts)
        record = PluginRecord("mm-x", "1.0", "X", "mm_x.plugin")
        pipeline: Any = SimpleNamespace(
            plugin=SimpleNamespace(record=record),
            processed=ProcessedItems(0),
            ctx=SimpleNamespace(limits={}),
            grammars=None,
        )
        settings = ServerSettings(served_model_names=("x",))
        self.service = Service(self.engine, pipeline, settings)  # type: ignore[arg-type]
        self.left = asyncio.Event()  # the client has
        self._stream = stream
        self._body_taken = False

    async def exchange(self, send: Callable[[Any], Any]) -> None:
        await Exchange(self.service, self._open)({"type": "http"}, self._receive, send)

    async def _open(self, service: Service, body: bytes, slots: Slots) -> Job:
        requests = [
            Request(str(index), (1,) * 7, SamplingParams())
            for index in range(len(self.engine.scripts))
        ]
        reply = CompletionReply(model="x", include_usage=False, num_choices=1, num_top=0)
        return Job(requests, reply, self._stream, blame=self.blame)

    async def _receive(self) -> dict[str, Any]:
        if not self._body_taken:
            self._body_taken = True
            return {"type": "http.request", "body": b"{}"}
        await self.left.wait()
        return {"type": "http.disconnect"}

    def summed(self, name: str) -> tuple[float, ...]:
        """Count and sum of a histogram."""
        get = self.service.metrics.registry.get_sample_value
        return tuple(get(f"mm_engine_{name}_{what}") or 0.0 for what in ("count", "sum"))

    @property
    def ended(self) -> dict[str, float]:
        """Completions by the reason why they ended, if there are any."""
        get = self.service.metrics.registry.get_sample_value
        name = "mm_engine_request_success_total"
        counts = {reason: get(name, {"finished_reason": reason}) for reason in REASONS}
        return {reason: count for reason, count in counts.items() if count}


async def take(message: Any) -> None:
    """Of a client that reads as fast as it can."""


def test_a_client_that_stops_reading_makes_no_token_late(clock: Clock) -> None:
    """The times are the engine's pace: its tokens come every second, whoever reads them when."""

    async def run() -> World:
        world = World(clock, ["a", "b", "c", "d", "."], stream=True)
        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)
            if len(sent) == 2:  # the first event, behind the headers
                await world.engine.quiet.wait()
                clock.now += 100

        await world.exchange(send)
        events = [message["body"].decode() for message in sent[1:]]
        texts = [json.loads(event[6:])["choices"][0]["text"] for event in events[:-1]]
        assert texts == ["a", "bcd."], "what came meanwhile is one event"
        assert events[-1] == "data: [DONE]\n\n"
        return world

    world = asyncio.run(run())
    assert world.summed("time_to_first_token_seconds") == (1, 1)
    assert world.summed("inter_token_latency_seconds") == (4, 4)
    assert world.summed("request_decode_time_seconds") == (1, 4)
    assert world.summed("request_time_per_output_token_seconds") == (1, 1)
    assert world.summed("e2e_request_latency_seconds") == (1, 105), "up to the last byte"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("scripts", "ended", "num_prompts"),
    [
        ([["a", "."]], {"stop": 1}, 1),
        ([[REFUSED]], {}, 0),
        ([["a", SILENCE], [SILENCE], ["a", REFUSED]], {"abort": 2}, 2),
        ([[PluginError("broken")]], {"error": 1}, 1),
        ([["a", SILENCE], [EngineDead("gone")]], {"error": 2}, 2),
    ],
    ids=["answered", "refused", "refused with others", "plugin", "engine"],
)
def test_failures_are_errors_and_what_was_refused_is_nothing(
    clock: Clock,
    scripts: list[list[str | Exception]],
    ended: dict[str, float],
    num_prompts: int,
    stream: bool,
) -> None:
    async def run() -> World:
        world = World(clock, *scripts, stream=stream)
        with contextlib.suppress(MMEngineError):
            await world.exchange(take)
        return world

    world = asyncio.run(run())
    assert world.ended == ended
    assert world.summed("request_prompt_tokens") == (num_prompts, 7 * num_prompts)
    assert world.summed("request_generation_tokens")[0] == sum(ended.values())


def test_what_the_end_of_the_drain_ends_is_an_error(clock: Clock) -> None:
    async def run() -> World:
        world = World(clock, ["a", SILENCE])
        exchange = asyncio.create_task(world.exchange(take))
        await world.engine.quiet.wait()
        world.service.expire()
        with pytest.raises(Overloaded, match="shutting down"):
            await exchange
        return world

    assert asyncio.run(run()).ended == {"error": 1}


def test_a_client_that_leaves_aborts_and_has_no_latency(clock: Clock) -> None:
    async def run() -> World:
        world = World(clock, ["a", SILENCE])
        exchange = asyncio.create_task(world.exchange(take))
        await world.engine.quiet.wait()
        world.left.set()
        await exchange
        return world

    world = asyncio.run(run())
    assert world.ended == {"abort": 1}
    assert world.summed("e2e_request_latency_seconds") == (0, 0), "it never got a last byte"


@pytest.mark.parametrize("stream", [False, True])
def test_its_place_is_free_before_its_last_bytes_are_sent(clock: Clock, stream: bool) -> None:
    """Whoever has them may ask again at once, and finds a place where there is but one."""

    async def run() -> list[int]:
        world = World(clock, ["a", "b", "."], stream=stream)
        held: list[int] = []

        async def send(message: Any) -> None:
            held.append(world.service.num_prompts)

        await world.exchange(send)
        return held

    held = asyncio.run(run())
    assert held[-1] == 0
    assert held[:-1] == ([1] * (len(held) - 1) if stream else [0])


@pytest.mark.parametrize("stream", [False, True])
def test_the_engines_error_is_told_as_its_request_has_it(clock: Clock, stream: bool) -> None:
    """Behind the first token of a stream, too, whose status says nothing any more."""

    async def run() -> bytes:
        world = World(clock, ["a", PluginError("mm-x 1.0: raised ValueError.")], stream=stream)
        world.blame = lambda error: REFUSED if isinstance(error, PluginError) else error
        sent: list[bytes] = []

        async def send(message: Any) -> None:
            sent.append(message.get("body", b""))

        with contextlib.nullcontext() if stream else pytest.raises(RequestError, match="exceeds"):
            await world.exchange(send)
        assert world.ended == {"abort": 1}
        return b"".join(sent)

    told = asyncio.run(run())
    assert (b'"invalid_request_error"' in told) == stream and b"plugin_error" not in told
