"""One streamed request to an OpenAI-compatible server, with the time of everything that comes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx

CONNECT_SECONDS = 60.0
SILENT_SECONDS = 600.0  # a request that hears nothing for so long has failed


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a request failed: the HTTP status or, without one, what happened; and what was said."""

    kind: str  # "429", "ConnectError", "stream"
    message: str


@dataclass(slots=True)
class Measured:
    """What became of one request. Times are `time.perf_counter()`, in seconds."""

    index: int
    begin: float = 0.0  # when it was sent
    end: float = 0.0  # when its stream had ended, or it had failed
    first_event: float | None = None  # the first that told of the answer, with text or without
    text_times: list[float] = field(default_factory=list)  # of events that brought text
    prompt_tokens: int | None = None  # as the server counts them; None: it didn't say
    cached_tokens: int = 0  # of the prompt, that the server needn't compute
    output_tokens: int = 0
    failure: Failure | None = None

    @property
    def e2e(self) -> float:
        """End-to-end latency: from sending to the stream's end."""
        return self.end - self.begin

    @property
    def ttft(self) -> float | None:
        """Time to the first text (of an answer without any: to its first event)."""
        first = self.text_times[0] if self.text_times else self.first_event
        return None if first is None else first - self.begin

    @property
    def itls(self) -> list[float]:
        """Inter-token latencies: the time between one text and the next."""
        return [b - a for a, b in zip(self.text_times, self.text_times[1:], strict=False)]

    @property
    def tpot(self) -> float | None:
        """Time per output token after the first; None if there was but one."""
        if self.ttft is None or self.output_tokens < 2:
            return None
        last = self.text_times[-1] if len(self.text_times) > 1 else self.end
        return (last - self.begin - self.ttft) / (self.output_tokens - 1)


def base_of(url: str) -> str:
    """A server's address without the `/v1` that clients write after it."""
    return url.rstrip("/").removesuffix("/v1")


def open_client(url: str, api_key: str | None) -> httpx.AsyncClient:
    """A client for the server at `url` with no limit on connections: whoever loads must not wait.

    The environment's proxies apply, but not to a server on this machine.
    """
    local = httpx.URL(url).host in ("127.0.0.1", "::1", "localhost")
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    return httpx.AsyncClient(
        base_url=url,
        headers=headers,
        timeout=httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS),
        limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        trust_env=not local,
    )


async def ask(client: httpx.AsyncClient, endpoint: str, body: bytes, index: int = 0) -> Measured:
    """Send `body`, which asks for a stream, and note what comes and when. Never raises for it."""
    measured = Measured(index, begin=time.perf_counter())
    headers = {"Content-Type": "application/json"}
    ended = False
    try:
        async with client.stream("POST", endpoint, content=body, headers=headers) as response:
            if response.status_code != httpx.codes.OK:
                text = (await response.aread()).decode("utf-8", "replace")
                measured.failure = Failure(str(response.status_code), message_of(text))
            else:
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        ended = ended or _take(line[5:].strip(), measured)
        if measured.failure is None and not ended:
            measured.failure = Failure("stream", "the stream was cut off before its end")
    except (httpx.HTTPError, httpx.InvalidURL, ValueError) as error:
        measured.failure = Failure(type(error).__name__, " ".join(str(error).split()))
    measured.end = time.perf_counter()
    return measured


def _take(data: str, measured: Measured) -> bool:
    """Note an event; returns whether it was the last."""
    now = time.perf_counter()
    if data == "[DONE]":
        return True
    event = json.loads(data)
    if "error" in event:
        measured.failure = Failure("stream", message_of(data))
        return True
    choices = event.get("choices") or ()
    if choices and measured.first_event is None:
        measured.first_event = now
    if any(map(_text_of, choices)):
        measured.text_times.append(now)
        measured.output_tokens += 1  # until the usage says how many it really are
    usage = event.get("usage")
    if usage:
        measured.prompt_tokens = usage["prompt_tokens"]
        measured.output_tokens = usage["completion_tokens"]
        details = usage.get("prompt_tokens_details") or {}
        measured.cached_tokens = details.get("cached_tokens") or 0
    return False


def _text_of(choice: Mapping[str, Any]) -> str:
    return choice.get("text") or (choice.get("delta") or {}).get("content") or ""


def message_of(body: str) -> str:
    """The message in an error's body, in OpenAI's shape or another, on one line."""
    try:
        found = json.loads(body)
        message = found["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body
    return " ".join(str(message).split())[:300]
