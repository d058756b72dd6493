"""When requests are sent: by a random process, or as soon as a place is free."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


def arrival_times(
    count: int, rate: float, burstiness: float, rng: np.random.Generator
) -> list[float]:
    """Seconds at which `count` requests arrive, the first at 0, `rate` a second on average.

    Gaps are gamma-distributed with shape `burstiness`: 1 is a Poisson process, less comes in
    bursts, more is more even. With an infinite rate all arrive at once.
    """
    if math.isinf(rate):
        return [0.0] * count
    gaps = rng.gamma(shape=burstiness, scale=1 / (rate * burstiness), size=count)
    gaps[:1] = 0.0
    return [float(time) for time in gaps.cumsum()]


async def drive(
    arrivals: Sequence[float],
    send: Callable[[int], Awaitable[None]],
    max_concurrency: int | None = None,
) -> None:
    """Call `send(i)` at `arrivals[i]` seconds from now, however long earlier calls take.

    With `max_concurrency`, a call also waits until fewer than that many run; they begin in order.
    """
    loop = asyncio.get_running_loop()
    begin = loop.time()
    places = asyncio.Semaphore(max_concurrency) if max_concurrency else contextlib.nullcontext()

    async def in_place(index: int) -> None:
        async with places:
            await send(index)

    async with asyncio.TaskGroup() as group:
        for index, arrival in enumerate(arrivals):
            await asyncio.sleep(max(0.0, begin + arrival - loop.time()))
            group.create_task(in_place(index))
