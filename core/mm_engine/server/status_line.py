"""One line every few seconds of what the server is doing, while it does something."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from mm_engine.errors import MMEngineError
from mm_engine.server.metrics import CacheCounts, cache_counts

if TYPE_CHECKING:
    from mm_engine.engine.status import EngineStats
    from mm_engine.inputs.processed_items import ProcessedItems
    from mm_engine.server.service import Service

logger = logging.getLogger(__name__)

_SHORT = {"prefix_cache": "prefix", "encoder_cache": "features", "mm_cache": "images"}


class StatusLine:
    """What changed since the last line."""

    def __init__(self, processed: ProcessedItems) -> None:
        self._processed = processed
        self._stats: EngineStats | None = None
        self._caches: dict[str, CacheCounts] = {}
        self._time = 0.0

    def update(self, stats: EngineStats, now: float) -> str | None:
        """The line at the time `now` (seconds); None if nothing runs, waits, or has happened."""
        before, elapsed = self._stats, now - self._time
        caches = cache_counts(stats, self._processed)
        news = {
            name: counts.since(self._caches.get(name, CacheCounts(0, 0)))
            for name, counts in caches.items()
        }
        self._stats, self._caches, self._time = stats, caches, now
        if before is None or elapsed <= 0 or stats.num_steps < before.num_steps:
            return None  # the first line, also of an engine that was started again
        prompt = (stats.num_prompt_tokens - before.num_prompt_tokens) / elapsed
        generation = (stats.num_generation_tokens - before.num_generation_tokens) / elapsed
        if not (stats.num_running or stats.num_waiting or stats.num_steps > before.num_steps):
            return None
        guessed = CacheCounts(
            stats.num_draft_tokens - before.num_draft_tokens,
            stats.num_accepted_tokens - before.num_accepted_tokens,
        )
        hits = [f"{_SHORT[name]} {new.rate:.0%}" for name, new in news.items() if new.queries]
        return " · ".join(
            [
                f"running {stats.num_running}, waiting {stats.num_waiting}",
                f"prompt {prompt:.0f}, answers {generation:.0f} tokens/s",
                f"KV cache {stats.num_used_blocks / stats.num_blocks:.0%}",
                *([f"hits: {', '.join(hits)}"] if hits else []),
                *([f"drafts accepted {guessed.rate:.0%}"] if guessed.queries else []),
                *(
                    [f"preempted {stats.num_preemptions - before.num_preemptions}"]
                    if stats.num_preemptions > before.num_preemptions
                    else []
                ),
            ]
        )


async def log_status(service: Service, interval: float) -> None:
    """Log a line every `interval` seconds, until cancelled; none while the engine is gone."""
    line = StatusLine(service.pipeline.processed)
    while True:
        with contextlib.suppress(MMEngineError):
            text = line.update(await service.client.stats(), time.monotonic())
            if text is not None:
                logger.info("%s", text)
        await asyncio.sleep(interval)
