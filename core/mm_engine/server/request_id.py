"""`X-Request-Id`: the name of one HTTP request, for its client, the log and the traces alike."""

from __future__ import annotations

import re
import uuid

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_engine.log import request_id

_HEADER = b"x-request-id"
#: What a client may choose; anything else could be a prompt, or break a line of somebody's log.
_GOOD = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


class RequestId:
    """Pure ASGI middleware that gives each request an id: the client's own, or a new one.

    Every response carries it. It is `mm_engine.log.request_id` meanwhile, and in the scope's notes.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app under the id."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = [value for name, value in scope["headers"] if name == _HEADER]
        own = len(given) == 1 and _GOOD.fullmatch(given[0]) is not None
        chosen = given[0].decode("ascii") if own else uuid.uuid4().hex
        scope.setdefault("mm_engine.notes", {})["request_id"] = chosen

        async def named_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-request-id"] = chosen
            await send(message)

        before = request_id.set(chosen)
        try:
            await self.app(scope, receive, named_send)
        finally:
            request_id.reset(before)
