"""What a server's tokens cost beside the engine's own: HTTP with streams, and `LLM.generate`."""

from __future__ import annotations

import asyncio
import contextlib
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
from open_parts.light import ask_lightly, unpaused
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

    Server and engine stay for all rounds, and who isn't asked does nothing: so the two of a round
    follow each other at once, and what a machine can do changes less between them than from minute
    to minute. Which is first changes from round to round. The first round doesn't count.
    """
    workload = Workload(shape, read_pool(MODEL))
    offline, online = [], []
    flags = ("--max-num-seqs", str(num_streams), *FLAGS, *flags)
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder), *flags) as server,
        _Offline(num_streams) as engine,
    ):
        for number in range(1 + num_rounds):
            numbers = range(number * num_prompts, (number + 1) * num_prompts)
            prompts = [[BEGIN, *workload.text_ids(n)] for n in numbers]
            first = engine.measure(prompts, shape.output_len) if number % 2 else None
            tick()
            online.append(_online(server, prompts, shape.output_len, num_streams))
            tick()
            offline.append(first or engine.measure(prompts, shape.output_len))
    runs = {"offline": offline[1:], "http": online[1:]}
    rates = {
        name: [run["output_tokens"] / run["seconds"] for run in found]
        for name, found in runs.items()
    }
    ratios = [http / alone for http, alone in zip(rates["http"], rates["offline"], strict=True)]
    ratio = statistics.median(ratios)
    return {
        "flags": flags,
        "num_streams": num_streams,
        "num_prompts": num_prompts,
        "input_len": shape.input_len,
        "output_len": shape.output_len,
        **runs,
        "output_tokens_per_second": rates,
        "ratios": ratios,
        "ratio": ratio,
        "kept": ratio >= TARGET,
    }


class _Offline:
    """`LLM.generate` in a process of its own; ended on leaving."""

    def __init__(self, num_streams: int) -> None:
        options = {"kv_cache_memory": KV_CACHE, "max_num_seqs": num_streams}
        self._command = [sys.executable, str(OFFLINE)]
        self._command.append(json.dumps({"model": MODEL, "options": options}))

    def __enter__(self) -> _Offline:
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(self._command, stdin=pipe, stdout=pipe, text=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._process.terminate()
        self._process.communicate()

    def measure(self, prompts: list[list[int]], output_len: int) -> dict[str, Any]:
        """Have it answer these prompts, each with so many tokens.

        Raises:
            RuntimeError: it has ended.
        """
        assert self._process.stdin and self._process.stdout
        asked = json.dumps({"prompts": prompts, "output_len": output_len})
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{asked}\n")
            self._process.stdin.flush()
        told = self._process.stdout.readline()
        if not told:
            raise RuntimeError("the engine beside the server has ended; it said above why.")
        measured = json.loads(told)
        cores = measured.pop("cpu_seconds") / measured["seconds"]
        return {**measured, "cores_taken": {"engine": cores}}


def _online(
    server: Server, prompts: list[list[int]], output_len: int, num_streams: int
) -> dict[str, Any]:
    bodies = [_body(ids, output_len) for ids in prompts]
    with unpaused():
        before, own = server.cpu_seconds(), own_cpu()
        begin = time.perf_counter()
        answers = asyncio.run(_ask_all(httpx.URL(server.url), bodies, num_streams))
        seconds = time.perf_counter() - begin
        own = own_cpu() - own
    taken = {name: now - before[name] for name, now in server.cpu_seconds().items()}
    failures = [answer.failure for answer in answers if answer.failure is not None]
    if failures:
        raise RuntimeError(f"the server failed {len(failures)} requests: {failures[0].message}")
    taken["load generator"] = own
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
