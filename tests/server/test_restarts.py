"""An engine that dies is started again, a few times. Row 35 of the robustness table."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from mm_engine.server import supervisor
from mm_engine.server.settings import ServerSettings
from serving import FLAGS, ServerProcess, sse_events, wait_until

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "circle", "ignore_eos": True, "max_tokens": 4000}
SHORT: dict[str, Any] = {"prompt": "A red circle and", "max_tokens": 8, "temperature": 0.0}


def kill_engine(server: ServerProcess) -> None:
    for pid in server._children():
        os.kill(pid, signal.SIGKILL)


def serves(server: ServerProcess) -> bool:
    return server.http.get("/ready").status_code == 200


def test_a_killed_engine_is_replaced_and_clients_are_told(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, *FLAGS) as server:
        before = server.http.post(COMPLETIONS, json=SHORT).json()["choices"]
        ended: list[tuple[float, Any]] = []

        def ask(stream: bool) -> None:
            body = LONG | {"stream": stream}
            with httpx.Client(base_url=server.url, timeout=60) as client:
                answer = client.post(COMPLETIONS, json=body)
            if stream:
                *_, last = sse_events(iter(answer.text.splitlines()))
                ended.append((time.monotonic(), json.loads(last)["error"]["type"]))
            else:
                ended.append((time.monotonic(), answer.json()["error"]["type"]))

        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(8)]
        for thread in threads:
            thread.start()
        wait_until(lambda: server.metric("mm_engine_num_requests_running") == 8, "them to run")
        killed = time.monotonic()
        kill_engine(server)
        for thread in threads:
            thread.join()
        assert [kind for _, kind in ended] == ["engine_dead"] * 8
        assert max(when for when, _ in ended) - killed < 20

        health, refused = server.http.get("/health"), server.http.post(COMPLETIONS, json=SHORT)
        for answer in (health, refused):  # a start takes longer than these
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
        wait_until(lambda: serves(server), "the next engine", 60)
        assert server.http.post(COMPLETIONS, json=SHORT).json()["choices"] == before
        assert server.metric("mm_engine_restarts_total") == 1
        assert server.metric("mm_engine_up") == 1
        wait_until(lambda: server.is_idle, "it to be idle", 10)
        assert "is started again (1 of 3)" in server.output
        server.children = server._children()
        assert server.terminate() == 0
        assert server.leftovers() == []
        assert "Traceback" not in server.output


def test_one_that_dies_again_and_again_ends_the_server(tmp_path: Path) -> None:
    settings = {"max_engine_restarts": 1, "dead_engine_timeout": 0.5}
    with ServerProcess(tmp_path, settings=settings) as server:
        kill_engine(server)
        wait_until(lambda: server.process.poll() is not None or serves_again(server), "a restart")
        assert server.process.poll() is None
        server.children = server._children()
        kill_engine(server)
        assert server.process.wait(60) == 1
        assert server.leftovers() == []


def serves_again(server: ServerProcess) -> bool:
    return "takes requests again" in server.output


def test_a_start_that_fails_for_want_of_memory_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Row 35: whatever is raised, it is told, and the server doesn't end without a word."""
    monkeypatch.setattr(supervisor, "MAX_DELAY", 0.01)

    class Dead:
        alive = False

        async def close(self) -> None: ...

    counted: list[str] = []

    async def start() -> Any:
        counted.append("start")
        raise OSError(24, "Too many open files: /a/secret/path")

    service: Any = SimpleNamespace(
        client=Dead(),
        restarting=False,
        settings=ServerSettings(
            served_model_names=("x",), max_engine_restarts=3, dead_engine_timeout=0.0
        ),
    )
    asyncio.run(supervisor.supervise(service, start))
    assert len(counted) == 3 and not service.restarting
    assert sum("can't be started again: OSError at" in text for text in caplog.messages) == 3
    assert "secret" not in caplog.text


def test_sigterm_during_a_restart_ends_it_with_0(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, *FLAGS) as server:
        kill_engine(server)
        wait_until(lambda: "is started again" in server.output, "the restart to begin")
        wait_until(lambda: bool(server._children()), "the new engine's process")
        server.children = server._children()
        assert server.terminate() == 0
        assert server.leftovers() == []
        assert "Traceback" not in server.output


def test_an_engine_that_cant_be_started_again_is_given_up(demo_copy: Path, tmp_path: Path) -> None:
    settings = {"max_engine_restarts": 2, "dead_engine_timeout": 0.5}
    with ServerProcess(tmp_path, settings=settings, config={"model": str(demo_copy)}) as server:
        (demo_copy / "model.safetensors").write_bytes(b"nothing")
        kill_engine(server)
        assert server.process.wait(90) == 1
        assert "can't be started again" in server.output
        assert server.leftovers() == []
        assert "Traceback" not in server.output
