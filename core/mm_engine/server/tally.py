"""Counting an answer while it comes: tokens for `usage`, times for the metrics and the log."""

from __future__ import annotations

import time
from collections.abc import Sequence

from mm_engine.outputs import RequestOutput
from mm_engine.request import Request
from mm_engine.server.metrics import Metrics
from mm_engine.server.responses import PromptTokensDetails, Usage


class Tally:
    """Counts the answers to some requests; `arrived` is `time.perf_counter()` at their arrival."""

    def __init__(self, requests: Sequence[Request], metrics: Metrics, arrived: float) -> None:
        self.num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self.num_items = sum(len(request.items) for request in requests)
        self.num_completion_tokens = 0
        self.finish_reasons: list[str] = []
        self.first_token_seconds: float | None = None
        self._num_cached = dict.fromkeys(range(len(requests)), 0)
        self._metrics = metrics
        self._arrived = arrived
        self._last_token: dict[tuple[int, int], float] = {}

    def add(self, prompt: int, output: RequestOutput) -> None:
        """Count what is new for the prompt of this index."""
        now = time.perf_counter()
        self._num_cached[prompt] = max(self._num_cached[prompt], output.num_cached_tokens)
        for completion in output.outputs:
            if completion.token_ids:
                self.num_completion_tokens += len(completion.token_ids)
                self._time(now, (prompt, completion.index), len(completion.token_ids))
            if completion.finish_reason is not None:
                self.finish_reasons.append(completion.finish_reason)

    @property
    def usage(self) -> Usage:
        """The counts so far, in OpenAI's shape."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_completion_tokens,
            total_tokens=self.num_prompt_tokens + self.num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=sum(self._num_cached.values())),
        )

    def __str__(self) -> str:
        parts = [
            f"{self.num_prompt_tokens} prompt tokens",
            *([f"{self.num_items} images"] if self.num_items else []),
            f"{self.num_completion_tokens} tokens",
            *dict.fromkeys(self.finish_reasons),
        ]
        if self.first_token_seconds is not None:
            parts.append(f"first after {self.first_token_seconds:.2f} s")
        return " · ".join(parts)

    def _time(self, now: float, completion: tuple[int, int], num_tokens: int) -> None:
        if self.first_token_seconds is None:
            self.first_token_seconds = now - self._arrived
            self._metrics.first_token_seconds.observe(self.first_token_seconds)
        last = self._last_token.get(completion)
        if last is not None:
            self._metrics.token_seconds.observe(now - last)
        for _ in range(num_tokens - 1):  # of the same step: nobody waited for them
            self._metrics.token_seconds.observe(0.0)
        self._last_token[completion] = now
