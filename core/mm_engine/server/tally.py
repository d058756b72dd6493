"""Counting an answer while it comes: tokens for `usage`, times for the metrics and the log."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm_engine.errors import RequestError
from mm_engine.outputs import RequestTimes
from mm_engine.request import Request
from mm_engine.server.answer import News
from mm_engine.server.metrics import Metrics
from mm_engine.server.responses import PromptTokensDetails, Usage


@dataclass(slots=True)
class _Completion:
    """One completion so far; times are `time.perf_counter()`."""

    num_tokens: int = 0
    first_token: float = 0.0
    last_token: float = 0.0


@dataclass(slots=True)
class Timeline:
    """When one prompt was worked on; times are `time.perf_counter()`, of the first and last token.

    `times` tells what came before the first one; None: there is none.
    """

    times: RequestTimes | None = None
    first: float = 0.0
    last: float = 0.0


class Tally:
    """Counts the answers to some requests; `arrived` is `time.perf_counter()` at their arrival."""

    def __init__(self, requests: Sequence[Request], metrics: Metrics, arrived: float) -> None:
        self.requests = requests
        self.timelines = [Timeline() for _ in requests]
        self.num_prompt_tokens = sum(len(request.prompt_token_ids) for request in requests)
        self.num_items = sum(len(request.items) for request in requests)
        self.num_completion_tokens = 0
        self.finish_reasons: list[str] = []
        self.first_token_seconds: float | None = None
        self._num_cached = dict.fromkeys(range(len(requests)), 0)
        self._metrics = metrics
        self._arrived = arrived
        self._prompts = {  # their tokens, until close()
            prompt: len(request.prompt_token_ids) for prompt, request in enumerate(requests)
        }
        self._begun: set[int] = set()  # prompts that have a token of an answer
        self._open = {  # those that haven't ended
            (prompt, index): _Completion()
            for prompt, request in enumerate(requests)
            for index in range(request.sampling_params.n)
        }

    def add(self, news: News) -> None:
        """Count what is new."""
        prompt, output, came = news
        self._num_cached[prompt] = max(self._num_cached[prompt], output.num_cached_tokens)
        line = self.timelines[prompt]
        line.last = came
        if output.times is not None:
            line.times, line.first = output.times, came
            self._metrics.queue_seconds.observe(output.times.queue)
            self._metrics.prefill_seconds.observe(output.times.prefill)
        for new in output.outputs:
            completion = self._open[prompt, new.index]
            if new.token_ids:
                self._begun.add(prompt)
                self.num_completion_tokens += len(new.token_ids)
                self._time(came, completion, len(new.token_ids))
            if new.finish_reason is not None:
                self.finish_reasons.append(new.finish_reason)
                self._end(self._open.pop((prompt, new.index)), new.finish_reason)

    def fail(self, error: Exception) -> None:
        """Count what hasn't ended as ended by this error; a second call does nothing.

        What was refused never ran, and isn't counted: HTTP's status tells of it. The error doesn't
        say which prompt of its request it is about, so that goes for all that have no token yet;
        the others are given up on as if the client had left.
        """
        if not isinstance(error, RequestError):
            self.close("error")
            return
        self._open = {key: value for key, value in self._open.items() if key[0] in self._begun}
        self._prompts = {
            prompt: num for prompt, num in self._prompts.items() if prompt in self._begun
        }
        self.close("abort")

    def close(self, reason: str) -> None:
        """Count what hasn't ended as ended for this reason; a second call does nothing."""
        for completion in self._open.values():
            self._end(completion, reason)
        for num_tokens in self._prompts.values():
            self._metrics.prompt_tokens.observe(num_tokens)
        self._open, self._prompts = {}, {}

    @property
    def usage(self) -> Usage:
        """The counts so far, in OpenAI's shape."""
        return Usage(
            prompt_tokens=self.num_prompt_tokens,
            completion_tokens=self.num_completion_tokens,
            total_tokens=self.num_prompt_tokens + self.num_completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=self.num_cached_tokens),
        )

    @property
    def num_cached_tokens(self) -> int:
        """Tokens of the prompts that were found in the KV cache."""
        return sum(self._num_cached.values())

    @property
    def fields(self) -> dict[str, Any]:
        """The counts so far, for a line of the log in JSON."""
        first = self.first_token_seconds
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "images": self.num_items,
            "first_token_seconds": None if first is None else round(first, 6),
            "finish_reasons": self.finish_reasons,
        }

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

    def _time(self, came: float, completion: _Completion, num_tokens: int) -> None:
        if self.first_token_seconds is None:
            self.first_token_seconds = came - self._arrived
            self._metrics.first_token_seconds.observe(self.first_token_seconds)
        if completion.num_tokens:  # those that are told together share the time since the last
            seconds = (came - completion.last_token) / num_tokens
            self._metrics.token_seconds.observe(seconds, num_tokens)
        else:
            completion.first_token = came
            self._metrics.token_seconds.observe(0.0, num_tokens - 1)
        completion.last_token = came
        completion.num_tokens += num_tokens

    def _end(self, completion: _Completion, reason: str) -> None:
        self._metrics.ended.labels(reason).inc()
        self._metrics.generation_tokens.observe(completion.num_tokens)
        if completion.num_tokens:
            seconds = completion.last_token - completion.first_token
            self._metrics.decode_seconds.observe(seconds)
            if completion.num_tokens > 1:
                self._metrics.mean_token_seconds.observe(seconds / (completion.num_tokens - 1))
