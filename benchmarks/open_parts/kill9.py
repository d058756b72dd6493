"""The engine process is killed while it answers: who is told, and how soon is there another?"""

from __future__ import annotations

import asyncio
import json
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from mm_engine.cli.bench.bodies import COMPLETIONS
from mm_engine.cli.bench.client import Measured, ask, open_client
from open_parts.server import Server, wait_until

TOLD_SECONDS = 2.0  # within which each client gets its error
SPARE_SECONDS = 2.0  # that a restart may take longer than a cold start
LIMIT_SECONDS = 120.0
FLAGS = ("--dtype", "float32", "--log-level", "warning", "--disable-log-stats")
REFERENCE: dict[str, Any] = {
    "prompt": "a large red circle and",
    "temperature": 0.0,
    "max_tokens": 24,
    "ignore_eos": True,
}
STREAM: dict[str, Any] = {**REFERENCE, "stream": True, "temperature": 1.0, "max_tokens": 4000}


def kill9(num_streams: int, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """Start a server, kill its engine under load, end the server; the figures of this round."""
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder), *FLAGS, *flags) as server:
        known = server.processes()
        before, files = _answer(server), server.leftovers([])
        killed, streams = asyncio.run(_kill_under_load(server, num_streams, known["engine"]))
        wait_until(server.is_ready, "/ready to answer 200", LIMIT_SECONDS)
        ready = time.perf_counter() - killed
        after = _answer(server)
        served = time.perf_counter() - killed
        wait_until(server.is_idle, "it to hold nothing for requests", 10.0)
        left = server.leftovers([known["engine"]])
        now = server.processes()
        server.process.send_signal(signal.SIGTERM)
        code = server.process.wait(LIMIT_SECONDS)
        at_end = server.leftovers([*known.values(), *now.values()])
        tracebacks = server.log.read_text("utf-8", "replace").count("Traceback")
    figures = {
        "num_streams": num_streams,
        "told_seconds": sorted(stream.end - killed for stream in streams),
        "told": sorted({stream.failure.message for stream in streams if stream.failure}),
        "num_told": sum(stream.failure is not None for stream in streams),
        "num_cut_off": sum(_is_cut_off(stream) for stream in streams),
        "cold_start_seconds": server.start_seconds,
        "ready_again_seconds": ready,
        "serving_again_seconds": served,
        "num_left_behind": len(left) - len(files),  # a new engine has files of its own
        "left_at_end": at_end,
        "exit_status": code,
        "num_tracebacks": tracebacks,
        "same_answer": after == before,
    }
    return {**figures, "kept": is_kept(figures)}


def is_kept(figures: dict[str, Any]) -> bool:
    """Whether a round brought what it has to."""
    return bool(
        figures["num_told"] == figures["num_streams"]
        and not figures["num_cut_off"]
        and max(figures["told_seconds"]) <= TOLD_SECONDS
        and figures["serving_again_seconds"] <= figures["cold_start_seconds"] + SPARE_SECONDS
        and figures["num_left_behind"] <= 0
        and not figures["left_at_end"]
        and figures["exit_status"] == 0
        and not figures["num_tracebacks"]
        and figures["same_answer"]
    )


def _is_cut_off(stream: Measured) -> bool:
    """Whether a stream ended without a word on why."""
    return stream.failure is None or "cut off" in stream.failure.message


def _answer(server: Server) -> str:
    told = server.http.post(COMPLETIONS, json=REFERENCE).json()
    return str(told["choices"][0]["text"])


async def _kill_under_load(
    server: Server, num_streams: int, engine: psutil.Process
) -> tuple[float, list[Measured]]:
    """When the engine was killed (`time.perf_counter`), and what its clients saw."""
    body = json.dumps(STREAM).encode()
    async with open_client(server.url, None) as client, asyncio.TaskGroup() as group:
        tasks = [group.create_task(ask(client, COMPLETIONS, body)) for _ in range(num_streams)]
        deadline = time.monotonic() + LIMIT_SECONDS
        while await _num_running(client) < num_streams:
            if time.monotonic() > deadline:
                raise RuntimeError(f"the streams don't all run after {LIMIT_SECONDS:g} s.")
        killed = time.perf_counter()
        engine.kill()
    return killed, [task.result() for task in tasks]


async def _num_running(client: Any) -> float:
    text = (await client.get("/metrics")).text
    lines = (line.split() for line in text.splitlines())
    return next(float(line[1]) for line in lines if line[0] == "mm_engine_num_requests_running")
