"""Traces of completion requests by OpenTelemetry: how long each part took, never what was said.

Used only where `--otlp-traces-endpoint` is given. The names of attributes are those of
OpenTelemetry's conventions for generative AI; what has no name there begins with `mm_engine.`.
"""

from __future__ import annotations

import importlib
import logging
import os
import threading
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from itertools import pairwise
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from mm_engine.errors import MMEngineError, StartupError
from mm_engine.log import place_of
from mm_engine.server.tally import Tally

logger = logging.getLogger(__name__)

FLAG = "--otlp-traces-endpoint"
TRACES_PATH = "/v1/traces"  # where collectors take them over HTTP
#: The routes that are traced, and what OpenTelemetry calls what they do.
OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "text_completion",
    "/v1/responses": "chat",
}
CLOSE_SECONDS = 3.0  # for the last spans to leave
_NEEDED = (
    "opentelemetry.sdk.trace.export",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
)
_PROPAGATED = (b"traceparent", b"tracestate")
#: Attributes by fields of `SamplingParams`, told where they are set.
_PARAMETERS = {
    "max_tokens": "max_tokens",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "seed": "seed",
    "frequency_penalty": "frequency_penalty",
    "presence_penalty": "presence_penalty",
    "choice.count": "n",
}


def check_endpoint(endpoint: str) -> str:
    """The address that spans are sent to; a path is added where there is none.

    Raises:
        StartupError: it's no address, or OpenTelemetry isn't installed.
    """
    try:
        parts = urlsplit(endpoint)
        good = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        good = False
    if not good:
        raise StartupError(
            f"{FLAG} is no address of HTTP. Give one such as http://127.0.0.1:4318{TRACES_PATH}."
        )
    try:
        for module in _NEEDED:
            importlib.import_module(module)
    except ImportError:
        raise StartupError(
            f"{FLAG} needs a package that isn't installed: OpenTelemetry. "
            "pip install 'mm-engine[otel]', or leave the flag out."
        ) from None
    return endpoint if parts.path.strip("/") else f"{endpoint.rstrip('/')}{TRACES_PATH}"


class Traces:
    """Makes spans and sends them, in batches and from a thread of its own.

    Nothing waits for the collector: where it doesn't answer, spans are dropped.
    """

    def __init__(self, endpoint: str) -> None:
        """Begin to send to `endpoint`, which `check_endpoint` has returned."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        version = metadata.version("mm-engine")
        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "mm-engine"}
        resource = Resource.create({**named, "service.version": version})
        own = logging.getLogger("opentelemetry")  # its lines repeat the address
        own.addHandler(logging.NullHandler())
        own.propagate = False
        exporter: Any = _Exporter(OTLPSpanExporter(endpoint=endpoint))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("mm_engine", version)

    def begin(self, name: str, headers: Sequence[tuple[bytes, bytes]], start: int) -> Any:
        """A span of a request with these headers: of the client's trace, if they name one.

        `start` is in nanoseconds since 1970.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier = {k.decode(): v.decode("latin-1") for k, v in headers if k in _PROPAGATED}
        context = TraceContextTextMapPropagator().extract(carrier, Context())
        return self._tracer.start_span(name, context, SpanKind.SERVER, start_time=start)

    def part(self, span: Any, name: str, start: int, end: int, **attributes: Any) -> None:
        """A part of a span that is over: nanoseconds since 1970."""
        from opentelemetry.context import Context
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(span, Context())
        part = self._tracer.start_span(name, context, attributes=attributes, start_time=start)
        part.end(end)

    def close(self) -> None:
        """Send what is left, unless that takes longer than `CLOSE_SECONDS`."""
        thread = threading.Thread(target=self._provider.shutdown, daemon=True)
        thread.start()
        thread.join(CLOSE_SECONDS)


class _Exporter:
    """An exporter of spans that says once when it fails, and once when it doesn't any more."""

    def __init__(self, exporter: Any) -> None:
        self._exporter = exporter
        self._fails = False

    def export(self, spans: Sequence[Any]) -> Any:
        """Send spans (called by OpenTelemetry, in its thread)."""
        result = self._exporter.export(spans)
        fails = result.name != "SUCCESS"
        if fails and not self._fails:
            logger.warning(
                "Traces can't be sent; requests are answered all the same. Check the collector "
                "and %s.",
                FLAG,
            )
        elif self._fails and not fails:
            logger.info("Traces are sent again.")
        self._fails = fails
        return result

    def shutdown(self) -> None:
        """Send no more (called by OpenTelemetry)."""
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """There is nothing to wait for (called by OpenTelemetry)."""
        return True


class TraceRequests:
    """Pure ASGI middleware: a span for each completion request, with parts.

    They are `input` (body, images, hooks), and for each prompt `queue`, `prefill` and `decode`.
    """

    def __init__(self, app: ASGIApp, traces: Traces, model: str) -> None:
        self.app = app
        self._traces = traces
        self._model = model

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; no failure of tracing is the request's."""
        if scope["type"] != "http" or scope["path"] not in OPERATIONS or scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        notes: dict[str, Any] = scope.setdefault("mm_engine.notes", {})
        clock = _Clock()
        span = None
        try:
            operation = OPERATIONS[scope["path"]]
            name = f"{operation} {self._model}"
            span = self._traces.begin(name, scope["headers"], clock.start)
            notes["trace_id"] = f"{span.get_span_context().trace_id:032x}"
        except Exception as error:
            logger.debug("A trace can't begin: %s", place_of(error))
        try:
            await self.app(scope, receive, send)
        finally:
            if span is not None:
                try:
                    self._end(span, scope["path"], notes, clock)
                except Exception as error:
                    logger.debug("A trace can't end: %s", place_of(error))

    def _end(self, span: Any, route: str, notes: dict[str, Any], clock: _Clock) -> None:
        from opentelemetry.trace import Status, StatusCode

        if span.is_recording():
            span.set_attributes(dict(self._attributes(route, notes)))
            if error := _failure(notes):
                span.set_attribute("error.type", error)
                span.set_status(Status(StatusCode.ERROR))
            now = time.perf_counter()
            submitted = notes.get("submitted", now)
            self._traces.part(span, "input", clock.start, clock.epoch(submitted))
            if "tally" in notes:
                self._prompts(span, notes["tally"], clock)
        span.end(clock.epoch(time.perf_counter()))

    def _prompts(self, span: Any, tally: Tally, clock: _Clock) -> None:
        for index, line in enumerate(tally.timelines):
            if line.times is None:
                continue  # it was never begun
            prefill = line.first - line.times.prefill
            moments = (prefill - line.times.queue, prefill, line.first, line.last)
            spans = pairwise(clock.epoch(moment) for moment in moments)
            for part, (start, end) in zip(("queue", "prefill", "decode"), spans, strict=True):
                self._traces.part(span, part, start, end, **{"mm_engine.prompt": index})

    def _attributes(self, route: str, notes: dict[str, Any]) -> Iterator[tuple[str, Any]]:
        yield "gen_ai.operation.name", OPERATIONS[route]
        yield "gen_ai.provider.name", "mm-engine"
        yield "gen_ai.request.model", self._model
        yield "http.request.method", "POST"
        yield "http.route", route
        yield "http.response.status_code", notes.get("status", 0)
        yield "mm_engine.request_id", notes.get("request_id", "")
        if "tally" not in notes:
            return
        tally: Tally = notes["tally"]
        request = tally.requests[0]
        for name, field in _PARAMETERS.items():
            value = getattr(request.sampling_params, field)
            if value is not None:
                yield f"gen_ai.request.{name}", value
        yield "gen_ai.response.model", self._model
        # Each of a list of prompts has the answer's id and its own number.
        yield "gen_ai.response.id", request.request_id.removesuffix("-0")
        yield "gen_ai.response.finish_reasons", tuple(tally.finish_reasons)
        yield "gen_ai.usage.input_tokens", tally.num_prompt_tokens
        yield "gen_ai.usage.output_tokens", tally.num_completion_tokens
        yield "gen_ai.usage.cache_read.input_tokens", tally.num_cached_tokens
        yield "mm_engine.num_images", tally.num_items
        if tally.first_token_seconds is not None:
            yield "mm_engine.time_to_first_token", tally.first_token_seconds


class _Clock:
    """Makes moments of `time.perf_counter` nanoseconds since 1970, by a look at both clocks."""

    def __init__(self) -> None:
        self.start = time.time_ns()
        self._mark = time.perf_counter()

    def epoch(self, moment: float) -> int:
        """The nanosecond since 1970 of a moment."""
        return self.start + int(1e9 * (moment - self._mark))


def _failure(notes: dict[str, Any]) -> str | None:
    """What kind of error a request failed with; None if it didn't, or was the client's mistake."""
    if notes.get("status", 500) < 500 and "failed" not in notes:
        return None
    error = notes.get("error")
    return error.kind if isinstance(error, MMEngineError) else "server_error"
