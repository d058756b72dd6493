"""What a scrape of `/metrics` gets from an engine that is busy, or gone."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from mm_engine.engine.status import EngineStats
from mm_engine.errors import EngineDead
from mm_engine.inputs.processed_items import ProcessedItems
from mm_engine.plugins.record import PluginRecord
from mm_engine.server import app
from mm_engine.server.settings import ServerSettings

STATS = EngineStats(**{field.name: 3 for field in dataclasses.fields(EngineStats)})


class Engine:
    """Tells its numbers, or nothing while it is busy, or dies of the question."""

    alive = True
    busy = False
    dying = False

    async def stats(self) -> EngineStats:
        if self.dying:
            self.alive = False
            raise EngineDead("the engine has stopped.")
        if self.busy:
            await asyncio.Event().wait()
        return STATS


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Engine:
    monkeypatch.setattr(app, "STATS_TIMEOUT", 0.01)
    return Engine()


def scrape(engine: Engine, *states: dict[str, bool]) -> list[tuple[float, float | None]]:
    """For each state that the engine is put into: whether it is up, and its running sequences."""

    async def run() -> list[tuple[float, float | None]]:
        pipeline: Any = SimpleNamespace(
            plugin=SimpleNamespace(record=PluginRecord("mm-x", "1.0", "X", "mm_x.plugin")),
            processed=ProcessedItems(0),
            ctx=SimpleNamespace(limits={}),
            grammars=None,
        )
        settings = ServerSettings(served_model_names=("x",))
        server = app.create_app(engine, pipeline, settings)  # type: ignore[arg-type]
        seen = []
        transport = httpx.ASGITransport(server)
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            for state in states:
                vars(engine).update(state)
                reply = await client.get("/metrics")
                assert reply.status_code == 200
                values = dict(line.rsplit(" ", 1) for line in reply.text.splitlines())
                running = values.get("mm_engine_num_requests_running")
                seen.append((float(values["mm_engine_up"]), running and float(running)))
        return seen

    return asyncio.run(run())


def test_an_engine_that_is_busy_is_up_with_its_last_numbers(engine: Engine) -> None:
    assert scrape(engine, {"busy": True}, {"busy": False}, {"busy": True}) == [
        (1, None),
        (1, 3),
        (1, 3),
    ]


def test_an_engine_that_dies_in_a_scrape_is_down_and_tells_nothing(engine: Engine) -> None:
    assert scrape(engine, {}, {"dying": True}, {}) == [(1, 3), (0, None), (0, None)]
