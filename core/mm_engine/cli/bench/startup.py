"""How long a server takes from its process's start until it takes requests, part by part."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mm_engine.cli.bench.server import OwnServer


@dataclass(frozen=True, slots=True)
class Startup:
    """One start, in seconds; the parts follow each other and add up to `ready`."""

    imports: float  # from the process's start until the server's modules are imported; meanwhile
    # the engine process does the same
    checkpoint: float  # config, tokenizer and plugin read, the dummy data mapped
    engine_process: float  # until the engine process knows it; and HTTP is set up
    weights: float  # the model built, its weights read or drawn
    profile: float  # the dummy data run through the model, the KV cache allocated
    ready: float  # all of it


PARTS = ("imports", "checkpoint", "engine_process", "weights", "profile")


def measure_startup(
    model: str, options: dict[str, Any], num_iters: int, tick: Callable[[], None]
) -> list[Startup]:
    """Start a server and end it, `num_iters` times; `tick` is called after each.

    Raises:
        StartupError: the model can't be served.
    """
    starts = []
    for _ in range(num_iters):
        with OwnServer(model, options, max_queued_requests=1) as server:
            starts.append(_parts(server))
        tick()
    return starts


def _parts(server: OwnServer) -> Startup:
    told = server.ready
    ready = told["at"] - server.start
    built = told["load_seconds"] + told["profile_seconds"]
    return Startup(
        imports=told["imported_at"] - server.start,
        checkpoint=told["told_at"] - told["imported_at"],
        engine_process=told["at"] - told["told_at"] - built,
        weights=told["load_seconds"],
        profile=told["profile_seconds"],
        ready=ready,
    )
