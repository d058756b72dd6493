"""How the HTTP server was asked to run; what the engine was asked is in `EngineConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mm_engine.inputs.media import MediaLimits


@dataclass(frozen=True, kw_only=True, slots=True)
class ServerSettings:
    """Options of the HTTP server. Sizes are in bytes, times in seconds."""

    served_model_names: tuple[str, ...]  # the first is the one that answers carry
    hidden_model_names: tuple[str, ...] = ()  # taken in requests, not told in /v1/models
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = field(default=None, repr=False)
    media: MediaLimits = field(default_factory=MediaLimits)
    chat_template: str | None = None  # instead of the tokenizer's
    max_body_bytes: int = 32 * 2**20
    max_queued_requests: int = 256  # prompts in flight, waiting or running
    max_input_threads: int = 4  # prompts that are rendered, decoded and mapped at the same time
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"  # whether requests may have a priority
    body_timeout: float = 60.0  # for a request's body to arrive
    drain_timeout: float = 30.0  # for streams to finish after SIGTERM
    log_stats: bool = True  # a line on the load every few seconds
    status_interval: float = 10.0  # between two of these lines
    otlp_traces_endpoint: str | None = None  # where traces go; None: there are none
    dead_engine_timeout: float = 15.0  # how long /health answers 503 before the server exits
