"""One line in the log for each HTTP request: what was asked, never what was said."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_engine.errors import PluginError, RequestError
from mm_engine.server.errors import rejection_of
from mm_engine.server.metrics import Metrics

logger = logging.getLogger(__name__)

QUIET_ROUTES = frozenset({"/health", "/ready", "/metrics"})  # polled: they'd fill the log


class AccessLog:
    """Pure ASGI middleware that counts and logs requests by route, status and time."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app = app
        self._metrics = metrics
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app, then write the line."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        arrived = time.perf_counter()
        notes: dict[str, Any] = scope.setdefault("mm_engine.notes", {})
        status = 0

        async def watched_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        finally:
            # A path that isn't ours may hold anything, a key for example.
            unknown = notes.get("route", "(unknown route)")
            route = scope["path"] if scope["path"] in self._routes else unknown
            status = notes["status"] = notes.get("status", status)
            seconds = time.perf_counter() - arrived
            self._metrics.requests.labels(route, status).inc()
            self._metrics.http_seconds.labels(route).observe(seconds)
            if scope["method"] == "POST":
                self._count_errors(notes)
            self._log(scope["method"][:8], route, status, seconds, notes)

    def _count_errors(self, notes: dict[str, Any]) -> None:
        error = notes.get("error")
        if isinstance(error, PluginError):
            self._metrics.plugin_errors.inc()
        reason = notes.get("rejected") or (rejection_of(error) if error is not None else None)
        # The engine's refusal of a prompt comes late; other errors by then end what was taken.
        in_time = "tally" not in notes or isinstance(error, RequestError)
        if reason is not None and in_time and "failed" not in notes:
            self._metrics.rejected.labels(reason).inc()

    @staticmethod
    def _log(method: str, route: str, status: int, seconds: float, notes: dict[str, Any]) -> None:
        parts = [f"{method} {route} {status}", f"{seconds:.2f} s"]
        fields: dict[str, Any] = {
            "request_id": notes.get("request_id"),
            "method": method,
            "route": route,
            "status": status,
            "seconds": round(seconds, 6),
        }
        if "trace_id" in notes:
            fields["trace_id"] = notes["trace_id"]
        if "failed" in notes:
            parts.append(f"failed with {notes['failed']} in mid-stream")
            fields["failed_status"] = notes["failed"]
        if "tally" in notes:
            parts.append(str(notes["tally"]))
            fields |= notes["tally"].fields
        level = logging.DEBUG if route in QUIET_ROUTES else logging.INFO
        logger.log(level, "%s", " · ".join(parts), extra={"fields": fields})
