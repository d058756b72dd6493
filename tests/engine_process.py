"""What the tests of the engine process share: the bundled demo checkpoint and how to ask it."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Coroutine
from typing import Any

from mm_engine.config import EngineConfig
from mm_engine.engine.client import EngineClient
from mm_engine.outputs import RequestOutput
from mm_engine.plugins.discovery import demos
from mm_engine.request import Request

CONFIG = EngineConfig(
    model=min(demos()), dtype="float32", kv_cache_memory=2**24, block_size=16, progress=False
)


async def collect(client: EngineClient, request: Request) -> RequestOutput:
    total = RequestOutput(request.request_id)
    async with contextlib.aclosing(client.generate(request)) as outputs:
        async for output in outputs:
            total.extend(output)
    return total


async def until(condition: Callable[[], Coroutine[Any, Any, bool]]) -> None:
    """Poll; half a minute is long for what takes an instant."""
    async with asyncio.timeout(30.0):
        while not await condition():
            await asyncio.sleep(0.02)


async def idle(client: EngineClient) -> bool:
    stats = await client.stats()
    return stats.num_running == stats.num_waiting == stats.num_used_blocks == 0


def exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
