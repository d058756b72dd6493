"""Another engine where one has died, until that happens too often."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from mm_engine.errors import MMEngineError
from mm_engine.log import place_of

if TYPE_CHECKING:
    from mm_engine.engine.client import EngineClient
    from mm_engine.server.service import Service

logger = logging.getLogger(__name__)

WATCH_INTERVAL = 0.1  # seconds between looks at the engine process
MAX_DELAY = 30.0  # seconds before a start that follows others


async def supervise(service: Service, start: Callable[[], Awaitable[EngineClient]]) -> None:
    """Replace `service.client` whenever its engine has died, by what `start` makes.

    The first start comes at once, each that follows waits twice as long. Returns when there were
    more than `max_engine_restarts` within `restart_window`, some time later: until then /health
    tells of it.
    """
    settings = service.settings
    deaths: deque[float] = deque()
    while True:
        while service.client.alive:
            await asyncio.sleep(WATCH_INTERVAL)
        now = time.monotonic()
        while deaths and now - deaths[0] > settings.restart_window:
            deaths.popleft()
        deaths.append(now)
        if len(deaths) > settings.max_engine_restarts:
            break
        service.restarting = True
        try:
            await _restart(service, start, len(deaths))
        finally:
            service.restarting = False
    seconds = settings.dead_engine_timeout
    logger.error("the engine process is gone. This server exits in %g s.", seconds)
    await asyncio.sleep(seconds)


async def _restart(
    service: Service, start: Callable[[], Awaitable[EngineClient]], number: int
) -> None:
    most = service.settings.max_engine_restarts
    logger.error("the engine process is gone. It is started again (%d of %d).", number, most)
    await service.client.close()  # it has died: nothing of it may stay
    await asyncio.sleep(0.0 if number == 1 else min(2.0 ** (number - 2), MAX_DELAY))
    began = time.monotonic()
    try:
        service.client = await start()
    except MMEngineError as error:
        logger.error("the engine can't be started again: %s", error)
        return
    except Exception as error:  # no memory, no file descriptors, no folder for its socket
        logger.error("the engine can't be started again: %s.", place_of(error))
        return
    service.metrics.restarts.inc()
    service.pipeline.limit_length(service.client.info.kv_cache_tokens)
    logger.warning("the engine takes requests again, after %.1f s.", time.monotonic() - began)
