"""Ten times the load that a server sustains: who is answered, how soon, and does it stay well?"""

from __future__ import annotations

import asyncio
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from mm_engine.cli.bench.arrivals import arrival_times, drive
from mm_engine.cli.bench.bodies import COMPLETIONS, Bodies
from mm_engine.cli.bench.client import Measured
from mm_engine.cli.bench.online import allow_connections, read_pool
from mm_engine.cli.bench.workload import Shape, Workload
from open_parts.light import ask_lightly, unpaused
from open_parts.server import Server, wait_until

HEALTH = Path(__file__).with_name("health.py")
HEALTH_INTERVAL = 0.05  # seconds
MODEL = "llava-demo"
REFUSALS = ("429", "503")
IDLE_SECONDS = 30.0
WARM_UP_SECONDS = 3.0
HANG_SECONDS = 60.0  # after the last arrival all must have been answered
#: The KV cache holds what can run at once, so that it is full, and its memory taken, early.
FLAGS = ("--kv-cache-memory", "64MiB", "--log-level", "warning", "--disable-log-stats")
MAX_RATIO = 2.0  # of the admitted ones' p99 TTFT to that of the closed loop
MAX_HEALTH_SECONDS = 0.2  # p99
MAX_GROWTH = 32 * 2**20  # bytes of a process


@dataclass(slots=True)
class Phase:
    """Some load, and what came of it."""

    requests: list[Measured] = field(default_factory=list)
    begin: float = 0.0
    seconds: float = 0.0
    cpu: dict[str, float] = field(default_factory=dict)  # seconds of the server's processes
    own_cpu: float = 0.0  # of the process that loads
    num_hanging: int = 0
    polled: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        admitted = [request for request in self.requests if request.failure is None]
        kinds = Counter(request.failure.kind for request in self.requests if request.failure)
        ttfts = [request.ttft for request in admitted if request.ttft is not None]
        refused = [r.e2e for r in self.requests if r.failure and r.failure.kind in REFUSALS]
        offered = (max(r.begin for r in self.requests) - self.begin) or math.inf
        health = self.polled.get("seconds", [])
        return {
            "seconds": self.seconds,
            "num_requests": len(self.requests),
            "offered_per_second": len(self.requests) / offered,
            "num_admitted": len(admitted),
            "admitted_per_second": len(admitted) / self.seconds,
            "output_tokens_per_second": sum(r.output_tokens for r in admitted) / self.seconds,
            "failures": dict(kinds),
            "num_hanging": self.num_hanging,
            "ttft_seconds": percentiles(ttfts),
            "refusal_seconds": percentiles(refused),
            "health_seconds": percentiles(health),
            "num_health": len(health),
            "health_wrong": dict(Counter(self.polled.get("wrong", []))),
            "cores_taken": {
                **{name: taken / self.seconds for name, taken in self.cpu.items()},
                "load generator": self.own_cpu / self.seconds,
            },
        }


def percentiles(values: list[float]) -> dict[str, float] | None:
    """Median, 99th percentile and maximum; None without values."""
    if not values:
        return None
    median, p99, most = np.percentile(values, [50, 99, 100])
    return {"median": float(median), "p99": float(p99), "max": float(most)}


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked, and how much of it."""

    shape: Shape
    concurrency: int  # of the closed loop: as many as the engine runs at once
    closed_seconds: float
    open_seconds: float
    factor: float  # of the closed loop's rate, that the open one offers


def overload(
    load: Load, flags: tuple[str, ...], tick: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Both loads on one server with these flags; the figures."""
    with tempfile.TemporaryDirectory() as folder, Server(Path(folder), *FLAGS, *flags) as server:
        allow_connections(2048)
        closed, opened, memory = asyncio.run(_measure(server, load, tick))
    figures = {
        "flags": [*FLAGS, *flags],
        "closed_loop": closed.to_json(),
        "open_loop": opened.to_json(),
        "rss_bytes": memory,
    }
    return {**figures, "criteria": verdict(figures)}


def verdict(figures: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was held to what, and whether it was kept."""
    base, loaded = figures["closed_loop"], figures["open_loop"]
    before, after = figures["rss_bytes"]
    failures = [*base["failures"].items(), *loaded["failures"].items()]
    unanswered = {kind: n for kind, n in failures if kind not in REFUSALS}
    num_hanging = base["num_hanging"] + loaded["num_hanging"]
    growth = max(after[name] - before.get(name, 0) for name in after)
    ratio = loaded["ttft_seconds"]["p99"] / base["ttft_seconds"]["p99"]
    health = loaded["health_seconds"]["p99"]
    judged: dict[str, tuple[str, Any, bool]] = {
        "answered": (
            "each is answered, or refused with 429 or 503 and Retry-After",
            {**unanswered, "hanging": num_hanging},
            not unanswered and not num_hanging,
        ),
        "latency": (
            f"p99 TTFT of those admitted is at most {MAX_RATIO:g} times that at 1×",
            ratio,
            ratio <= MAX_RATIO,
        ),
        "health": (
            f"p99 of /health is under {1000 * MAX_HEALTH_SECONDS:g} ms, and all are 200",
            [health, loaded["health_wrong"]],
            health < MAX_HEALTH_SECONDS and not loaded["health_wrong"],
        ),
        "memory": (
            f"no process grows by more than {MAX_GROWTH // 2**20} MiB",
            growth / 2**20,
            growth <= MAX_GROWTH,
        ),
    }
    return {
        name: {"criterion": criterion, "found": found, "kept": bool(good)}
        for name, (criterion, found, good) in judged.items()
    }


async def _measure(
    server: Server, load: Load, tick: Callable[[], None]
) -> tuple[Phase, Phase, list[dict[str, int]]]:
    pool = read_pool(MODEL)
    bodies = [Bodies(Workload(load.shape, pool, stream=n), MODEL, COMPLETIONS) for n in range(3)]
    url = httpx.URL(server.url)
    seconds = min(WARM_UP_SECONDS, load.closed_seconds)
    await _closed(url, bodies[0], load.concurrency, seconds, Phase())
    base, loaded = Phase(), Phase()
    with _watched(server, base):
        await _closed(url, bodies[1], load.concurrency, load.closed_seconds, base)
    tick()
    memory = [_idle_memory(server)]
    rate = load.factor * len(base.requests) / base.seconds
    arrivals = arrival_times(
        int(rate * load.open_seconds), rate, 1.0, np.random.default_rng(load.shape.seed)
    )
    prepared = [bodies[2].body(number) for number in range(len(arrivals))]
    with _watched(server, loaded):
        await _open(url, prepared, arrivals, loaded)
    tick()
    memory.append(_idle_memory(server))
    return base, loaded, memory


async def _closed(
    url: httpx.URL, bodies: Bodies, concurrency: int, seconds: float, phase: Phase
) -> None:
    """So many clients, each of which asks again as soon as it is answered."""
    phase.begin = time.perf_counter()
    numbers = iter(range(10**9))

    async def ask_on() -> None:
        while time.perf_counter() - phase.begin < seconds:
            body = bodies.body(next(numbers))
            phase.requests.append(await ask_lightly(url, COMPLETIONS, body))

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(ask_on())
    phase.seconds = time.perf_counter() - phase.begin


async def _open(url: httpx.URL, prepared: list[bytes], arrivals: list[float], phase: Phase) -> None:
    """Clients that come when they come, whatever became of the others."""

    async def send(number: int) -> None:
        phase.requests.append(await ask_lightly(url, COMPLETIONS, prepared[number]))

    phase.begin = time.perf_counter()
    try:
        async with asyncio.timeout(arrivals[-1] + HANG_SECONDS):
            await drive(arrivals, send)
    except TimeoutError:
        phase.num_hanging = len(arrivals) - len(phase.requests)
    phase.seconds = time.perf_counter() - phase.begin


@contextmanager
def _watched(server: Server, phase: Phase) -> Iterator[None]:
    """Ask /health meanwhile, and count processor time."""
    url = httpx.URL(server.url)
    command = [sys.executable, str(HEALTH), url.host, str(url.port), str(HEALTH_INTERVAL)]
    poller = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    before, own = server.cpu_seconds(), own_cpu()
    try:
        with unpaused():
            yield
        phase.own_cpu = own_cpu() - own
        phase.cpu = {name: now - before[name] for name, now in server.cpu_seconds().items()}
    finally:
        told, _ = poller.communicate()
    phase.polled = json.loads(told)


def own_cpu() -> float:
    """Processor time that this process has taken so far, in seconds."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _idle_memory(server: Server) -> dict[str, int]:
    """Bytes of each process once nobody is being answered."""
    wait_until(server.is_idle, "it to hold nothing for requests", IDLE_SECONDS)
    return {name: held.rss for name, held in server.snapshot().processes.items()}
