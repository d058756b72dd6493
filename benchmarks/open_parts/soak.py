"""Thousands of mixed requests on one server: what it holds, and whether its answers change."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from mm_engine.plugins.discovery import demos
from open_parts.caller import Came, answer_of, call, open_client
from open_parts.server import HELD_FOR_REQUESTS, KEPT, TASKS, Server, Snapshot, wait_until
from open_parts.traffic import (
    CHAT,
    COMPLETIONS,
    QUESTIONS,
    RESPONSES,
    TOKENIZE,
    Asked,
    Traffic,
    data_url,
    message,
)

IDLE_SECONDS = 10.0  # that may pass until everything is given back
MIB = 2**20
#: Answers in float32 don't depend on what else is in a step; small caches are full early.
FLAGS = (
    *("--dtype", "float32", "--kv-cache-memory", "64MiB", "--encoder-cache-memory", "4MiB"),
    *("--mm-processor-cache-memory", "16MiB", "--disable-log-stats", "--log-level", "warning"),
)
MAX_COMPLAINTS = 20  # that a record tells in full


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What the server held when so many requests had been sent and nobody was being answered."""

    num_requests: int
    seconds: float
    snapshot: Snapshot
    idle_after: float  # seconds until it held nothing for anybody


@dataclass(slots=True)
class Run:
    """What came of all requests."""

    checkpoints: list[Checkpoint] = field(default_factory=list)
    statuses: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    complaints: list[str] = field(default_factory=list)
    num_references: int = 0
    wrong_references: list[str] = field(default_factory=list)

    def note(self, asked: Asked, came: Came) -> None:
        """Count what came of one."""
        self.statuses[asked.kind]["left" if came.status is None else str(came.status)] += 1
        if came.complaint:
            self.complaints.append(f"{asked.kind}: {came.complaint}")


def soak(
    num_requests: int,
    *,
    concurrency: int,
    every: int,
    seed: int,
    max_growth: float,
    flags: tuple[str, ...] = (),
    tick: Callable[[int], None] = lambda num: None,
) -> dict[str, Any]:
    """Send `num_requests`, looking at the server after `every`; the record's figures.

    `max_growth` is the most that a process's memory may grow: MiB in 1,000 requests.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        Server(Path(folder), *FLAGS, *flags) as server,
    ):
        run = Run()
        asyncio.run(_send_all(server, run, num_requests, concurrency, every, seed, tick))
        log = server.log.read_text("utf-8", "replace")
    criteria = verdict(run, max_growth)
    return {
        "flags": [*FLAGS, *flags],
        "num_requests": num_requests,
        "concurrency": concurrency,
        "seed": seed,
        "seconds": run.checkpoints[-1].seconds,
        "requests": {
            kind: dict(sorted(run.statuses[kind].items())) for kind in sorted(run.statuses)
        },
        "num_complaints": len(run.complaints),
        "complaints": run.complaints[:MAX_COMPLAINTS],
        "num_references": run.num_references,
        "wrong_references": run.wrong_references[:MAX_COMPLAINTS],
        "num_tracebacks": log.count("Traceback"),
        "checkpoints": [
            {
                "num_requests": checkpoint.num_requests,
                "seconds": round(checkpoint.seconds, 1),
                "idle_after": round(checkpoint.idle_after, 3),
                **checkpoint.snapshot.to_json(),
            }
            for checkpoint in run.checkpoints
        ],
        "criteria": criteria,
        "flat": all(criterion["kept"] for criterion in criteria.values()),
    }


async def _send_all(
    server: Server,
    run: Run,
    num_requests: int,
    concurrency: int,
    every: int,
    seed: int,
    tick: Callable[[int], None],
) -> None:
    traffic, begin = Traffic(seed), time.monotonic()
    async with open_client(server.url) as client:
        expected = {
            name: answer_of(asked.path, (await call(client, asked)).body)
            for name, asked in references().items()
        }
    for first in range(0, num_requests, every):
        numbers = iter(range(first, min(first + every, num_requests)))
        async with open_client(server.url) as client, asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(_send(client, traffic, numbers, run, tick))
            group.create_task(_ask_references(client, expected, run))
        waited = wait_until(server.is_idle, "it to hold nothing for requests", IDLE_SECONDS)
        num_sent = min(first + every, num_requests)
        seconds = time.monotonic() - begin
        run.checkpoints.append(Checkpoint(num_sent, seconds, server.snapshot(), waited))


async def _send(
    client: httpx.AsyncClient,
    traffic: Traffic,
    numbers: Any,
    run: Run,
    tick: Callable[[int], None],
) -> None:
    for number in numbers:  # shared with the other senders
        asked = traffic.asked(number)
        run.note(asked, await call(client, asked))
        tick(1)


def references() -> dict[str, Asked]:
    """Questions whose answers are known from when the server was alone with them."""
    example = data_url((demos()["llava-demo"] / "example.png").read_bytes())
    rng = random.Random("references")
    turns = [message(QUESTIONS[0], [example])]
    greedy = {"temperature": 0.0, "max_tokens": 48}
    named = {"type": "json_schema", "json_schema": {"name": "told", "schema": SCHEMA}}
    parts = [
        {"type": "input_image", "image_url": example},
        {"type": "input_text", "text": QUESTIONS[1]},
    ]
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "caption": (CHAT, {"messages": turns, **greedy}),
        "count": (RESPONSES, {"input": [{"role": "user", "content": parts}], "temperature": 0.0}),
        "text": (COMPLETIONS, {"prompt": "a large ring and", "ignore_eos": True, **greedy}),
        "sampled": (
            COMPLETIONS,
            {"prompt": "a star", "seed": rng.randrange(999), "max_tokens": 32, "n": 2},
        ),
        "structured": (CHAT, {"messages": turns, "response_format": named, **greedy}),
        "tokens": (TOKENIZE, {"messages": turns}),
    }
    return {
        name: Asked(f"reference: {name}", path, json.dumps(body).encode())
        for name, (path, body) in asked.items()
    }


SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "maximum": 9}},
    "required": ["size"],
}


async def _ask_references(client: httpx.AsyncClient, expected: dict[str, Any], run: Run) -> None:
    """Ask while the others load the server: the answers must be those from before."""
    for name, asked in references().items():
        came = await call(client, asked)
        run.note(asked, came)
        run.num_references += 1
        if came.complaint or answer_of(asked.path, came.body) != expected[name]:
            run.wrong_references.append(name)


def verdict(run: Run, max_growth: float) -> dict[str, dict[str, Any]]:
    """What was held to what, and whether it was kept. Caches fill in the first half of a run."""
    half = len(run.checkpoints) // 2
    first, second = run.checkpoints[: half + 1], run.checkpoints[half:]
    growth = {
        name: slope([(c.num_requests, c.snapshot.processes[name].rss) for c in second]) * 1000 / MIB
        for name in second[0].snapshot.processes
    }
    names = [sorted(checkpoint.snapshot.processes) for checkpoint in second]
    held = max(c.snapshot.gauges[name] for c in run.checkpoints for name in HELD_FOR_REQUESTS)
    tasks = [checkpoint.snapshot.gauges[TASKS] for checkpoint in run.checkpoints]
    kept = {name: max(c.snapshot.gauges[name] for c in run.checkpoints) for name in KEPT}
    bounds = {name: second[-1].snapshot.gauges[bound] for name, bound in KEPT.items()}
    judged: dict[str, tuple[str, Any, bool]] = {
        "memory": (
            f"RSS of each process grows by at most {max_growth:g} MiB in 1,000 requests "
            "(least squares over the second half)",
            {name: round(value, 3) for name, value in growth.items()},
            max(growth.values()) <= max_growth,
        ),
        "processes": ("the same in the second half", names[-1], all(n == names[0] for n in names)),
        "held": (
            "blocks, requests running, waiting and in flight are 0 at each checkpoint",
            held,
            held == 0,
        ),
        "tasks": (
            "no more of the event loop's tasks at any checkpoint than at the first",
            [tasks[0], max(tasks)],
            max(tasks) <= tasks[0],
        ),
        "kept": (
            "kept blocks and encoder rows stay within their bounds",
            {name: [kept[name], bounds[name]] for name in KEPT},
            all(kept[name] <= bounds[name] for name in KEPT),
        ),
        "references": (
            "every answer is the one from the beginning",
            len(run.wrong_references),
            run.num_references > 0 and not run.wrong_references,
        ),
        "answers": (
            "good requests get 200 and their end, bad ones 4xx with OpenAI's error body",
            len(run.complaints),
            not run.complaints,
        ),
    }
    held_by = {
        what: {name: [_values(part, name, what) for part in (first, second)] for name in growth}
        for what in ("num_fds", "num_threads")
    }
    files, threads = (
        {name: [max(before), of(after)] for name, (before, after) in held_by[what].items()}
        for what, of in (("num_fds", max), ("num_threads", statistics.median))
    )
    judged["num_fds"] = (
        "no more in the second half than in the first",
        files,
        all(after <= before for before, after in files.values()),
    )
    judged["num_threads"] = (  # those that read input come and go
        "the second half's median is at most the first half's maximum",
        threads,
        all(after <= before for before, after in threads.values()),
    )
    return {
        name: {"criterion": criterion, "found": found, "kept": bool(good)}
        for name, (criterion, found, good) in judged.items()
    }


def _values(part: list[Checkpoint], name: str, what: str) -> list[int]:
    """What one process held at each checkpoint of a part at which it was there."""
    found = (checkpoint.snapshot.processes.get(name) for checkpoint in part)
    return [getattr(held, what) for held in found if held is not None]


def slope(points: list[tuple[float, float]]) -> float:
    """The slope of the line through points that least squares gives; 0 with a single one."""
    if len(points) < 2:
        return 0.0
    return statistics.linear_regression(*zip(*points, strict=True)).slope
