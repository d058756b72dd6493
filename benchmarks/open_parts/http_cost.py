"""What a server's tokens cost beside the engine's own: HTTP with streams, and `LLM.generate`."""

from __future__ import annotations

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from mm_engine.cli.bench.bodies import COMPLETIONS
from mm_engine.cli.bench.client import Measured
from mm_engine.cli.bench.online import read_pool
from mm_engine.cli.bench.workload import Shape, Workload
from open_parts.light import ask_lightly
from open_parts.overload import MODEL, own_cpu
from open_parts.server import Server

OFFLINE = Path(__file__).with_name("offline.py")
TARGET = 0.85
BEGIN = 1  # the token that the demo's texts begin with
KV_CACHE = 64 * 2**20
FLAGS = ("--kv-cache-memory", str(KV_CACHE), "--log-level", "warning", "--disable-log-stats")


def http_cost(
    shape: Shape,
    *,
    num_streams: int,
    num_prompts: int,
    num_rounds: int,
    flags: tuple[str, ...] = (),
    tick: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Both ways by turns, in rounds of `num_prompts`; the figures.

    In each round both are started anew, and answer once before it counts.
    """
    workload = Workload(shape, read_pool(MODEL))
    prompts = [[BEGIN, *workload.text_ids(number)] for number in range(2 * num_prompts)]
    rounds = [prompts[:num_prompts], prompts[num_prompts:]]
    offline, online = [], []
    for _ in range(num_rounds):
        offline.append(_offline(rounds, shape.output_len, num_streams))
        tick()
        online.append(_online(rounds, shape.output_len, num_streams, flags))
        tick()
    rates = {
        name: [run["output_tokens"] / run["seconds"] for run in runs]
        for name, runs in (("offline", offline), ("http", online))
    }
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "flags": [*FLAGS, *flags],
        "num_streams": num_streams,
        "num_prompts": num_prompts,
        "input_len": shape.input_len,
        "output_len": shape.output_len,
        "offline": offline,
        "http": online,
        "output_tokens_per_second": rates,
        "ratio": medians["http"] / medians["offline"],
        "kept": medians["http"] / medians["offline"] >= TARGET,
    }


def _offline(rounds: list[list[list[int]]], output_len: int, num_streams: int) -> dict[str, Any]:
    asked = {
        "model": MODEL,
        "options": {"kv_cache_memory": KV_CACHE, "max_num_seqs": num_streams},
        "output_len": output_len,
        "rounds": rounds,
    }
    done = subprocess.run(
        [sys.executable, str(OFFLINE)],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        check=True,
    )
    (measured,) = json.loads(done.stdout.splitlines()[-1])
    return {**measured, "cores_taken": {"engine": measured["cpu_seconds"] / measured["seconds"]}}


def _online(
    rounds: list[list[list[int]]], output_len: int, num_streams: int, flags: tuple[str, ...]
) -> dict[str, Any]:
    flags = ("--max-num-seqs", str(num_streams), *FLAGS, *flags)
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder), *flags) as server:
        for prompts in rounds:
            bodies = [_body(ids, output_len) for ids in prompts]
            before, own = server.cpu_seconds(), own_cpu()
            begin = time.perf_counter()
            answers = asyncio.run(_ask_all(httpx.URL(server.url), bodies, num_streams))
            seconds = time.perf_counter() - begin
            own = own_cpu() - own
            cpu = {name: now - before[name] for name, now in server.cpu_seconds().items()}
    failures = [answer.failure for answer in answers if answer.failure is not None]
    if failures:
        raise RuntimeError(f"the server failed {len(failures)} requests: {failures[0].message}")
    taken = {**cpu, "load generator": own}
    return {
        "seconds": seconds,
        "output_tokens": sum(answer.output_tokens for answer in answers),
        "cores_taken": {name: used / seconds for name, used in taken.items()},
    }


def _body(ids: list[int], output_len: int) -> bytes:
    asked = {
        "prompt": ids,
        "max_tokens": output_len,
        "temperature": 0,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    return json.dumps(asked).encode()


async def _ask_all(url: httpx.URL, bodies: list[bytes], num_streams: int) -> list[Measured]:
    """All of them, so many at once."""
    waiting = iter(bodies)
    answers: list[Measured] = []

    async def ask_on() -> None:
        for body in waiting:  # shared by all
            answers.append(await ask_lightly(url, COMPLETIONS, body))

    async with asyncio.TaskGroup() as group:
        for _ in range(num_streams):
            group.create_task(ask_on())
    return answers
