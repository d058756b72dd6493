"""One line in the log for each HTTP request: what was asked, never what was said."""

from __future__ import annotations

import logging
import time
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_engine.server.metrics import Metrics

logger = logging.getLogger(__name__)

QUIET_ROUTES = frozenset({"/health", "/metrics"})  # polled: they'd fill the log


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
            status = notes.get("status", status)
            self._metrics.requests.labels(route, status).inc()
            seconds = time.perf_counter() - arrived
            parts = [f"{scope['method'][:8]} {route} {status}", f"{seconds:.2f} s"]
            if "failed" in notes:
                parts.append(f"failed with {notes['failed']} in mid-stream")
            if "tally" in notes:
                parts.append(str(notes["tally"]))
            level = logging.DEBUG if route in QUIET_ROUTES else logging.INFO
            logger.log(level, "%s", " · ".join(parts))
