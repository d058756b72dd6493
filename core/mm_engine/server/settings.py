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
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # none: whoever asks is answered
    ssl_certfile: str | None = None  # with it and the key, HTTPS is spoken
    ssl_keyfile: str | None = field(default=None, repr=False)
    allowed_origins: tuple[str, ...] = ()  # web pages that browsers let ask (CORS)
    media: MediaLimits = field(default_factory=MediaLimits)
    allowed_media_domains: tuple[str, ...] = ()  # hosts that images are fetched from
    #: Networks that such hosts may be in although they aren't public. No flag sets it.
    private_media_networks: tuple[str, ...] = ()
    allowed_local_media_path: str | None = None  # the folder that file URLs may lead to
    chat_template: str | None = None  # instead of the tokenizer's
    #: Options of the image mapper that requests may set.
    allowed_mm_processor_kwargs: tuple[str, ...] = ()
    max_body_bytes: int = 32 * 2**20
    max_queued_requests: int = (
        64  # prompts in flight, waiting or running; see `config.default_queued_requests`
    )
    max_queued_tokens: int = 131_072  # of prompts in flight that have no token of an answer yet
    max_queue_seconds: float | None = None  # that a newcomer may have to expect to a first token
    max_requests_per_key: int | None = None  # at once; of all clients if there are no keys
    max_requests_per_minute: int | None = None  # of each key, likewise
    max_request_seconds: float | None = None  # from a request's arrival to the end of its answer
    max_input_threads: int = 4  # prompts that are rendered, decoded and mapped at the same time
    scheduling_policy: Literal["fcfs", "priority"] = "fcfs"  # whether requests may have a priority
    grammar_timeout: float = 5.0  # for one grammar of structured output to be compiled
    max_connections: int = 1024  # at once; another takes the place of one that is idle
    head_timeout: float = 10.0  # for a request's head to arrive, from the connection's start on
    body_timeout: float = 60.0  # for a request's body to arrive
    send_timeout: float = 60.0  # for a client to read what it is sent
    drain_timeout: float = 30.0  # for streams to finish after SIGTERM
    log_stats: bool = True  # a line on the load every few seconds
    status_interval: float = 10.0  # between two of these lines
    otlp_traces_endpoint: str | None = None  # where traces go; None: there are none
    max_engine_restarts: int = 3  # within `restart_window`; then the server gives up
    restart_window: float = 600.0
    dead_engine_timeout: float = 15.0  # how long /health answers 503 before the server exits
