"""Every error leaves in OpenAI's shape: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, MutableMapping
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mm_engine.errors import EngineDead, MMEngineError, Overloaded, PluginError, RequestError
from mm_engine.log import place_of, told_of

logger = logging.getLogger(__name__)

#: Why requests aren't taken.
REJECTIONS = (
    *("invalid", "unknown_model", "not_offered", "body_too_large", "body_too_slow", "api_key"),
    *("key_limit", "queue_full", "media_full", "grammars_full", "draining", "engine_dead"),
)
_BY_STATUS = {404: "not_offered", 408: "body_too_slow", 413: "body_too_large"}
INTERNAL = "internal error. The server's log has the place."
_UNKNOWN_ROUTE = "no such route. See /openapi.json for those that exist."


class ASCIIResponse(JSONResponse):
    """JSON that can't fail to encode: what a client sent may hold lone surrogates."""

    def render(self, content: Any) -> bytes:
        """Encode `content`; characters beyond ASCII are escaped."""
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


def error_body(
    message: str, kind: str, *, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """The body of an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def body_of(error: Exception) -> tuple[int, dict[str, Any]]:
    """Status and body for any exception; one that isn't ours is logged and stays unnamed."""
    if isinstance(error, RequestError):
        return error.status, error_body(str(error), error.kind, param=error.param, code=error.code)
    if isinstance(error, PluginError):
        told = told_of(error)
        logger.error("%s", told)
        logger.debug("In full: %s", error)
        return error.status, error_body(told, error.kind)
    if isinstance(error, MMEngineError):
        return error.status, error_body(str(error), error.kind)
    logger.error("internal error: %s", place_of(error))
    return 500, error_body(INTERNAL, "server_error")


def rejection_of(error: Exception) -> str | None:
    """Why a request wasn't taken: one of `REJECTIONS`; None if that isn't what the error says."""
    if isinstance(error, Overloaded):
        return error.reason
    if isinstance(error, EngineDead):
        return "engine_dead"
    if isinstance(error, RequestError):
        unknown = error.code == "model_not_found"
        return "unknown_model" if unknown else _BY_STATUS.get(error.status, "invalid")
    return None


def note_error(scope: MutableMapping[str, Any], error: Exception) -> None:
    """Leave what a request is answered with where the access log, metrics and traces find it."""
    scope.setdefault("mm_engine.notes", {})["error"] = error


def respond(
    status: int, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> ASCIIResponse:
    """A response with an error's body; one that leaves a body unread closes the connection."""
    closing = {"Connection": "close"} if status in (408, 413) else {}
    return ASCIIResponse(body, status, headers={**closing, **(headers or {})})


def error_response(error: Exception) -> ASCIIResponse:
    """The response for any exception."""
    status, body = body_of(error)
    seconds = getattr(error, "retry_after", None)
    return respond(status, body, None if seconds is None else {"Retry-After": str(seconds)})


def request_error_of(invalid: ValidationError, data: Any) -> RequestError:
    """The most particular thing that is wrong with a body, with its field, without its value."""
    errors = invalid.errors(include_url=False, include_input=False)
    error = max(errors, key=lambda error: len(error["loc"]))  # of equals, the first
    param = _field(error["loc"], data)
    message = error["msg"]
    if error["type"] == "union_tag_invalid":  # its own message repeats the value
        message = f"Its type should be one of {error['ctx']['expected_tags']}"
    return RequestError(f"{param or 'the body'}: {message}.", param=param)


def _field(location: tuple[int | str, ...], data: Any) -> str | None:
    """The path of a field as the client knows it: pydantic's has names of union members, too."""
    parts: list[str] = []
    for step, part in enumerate(location):
        known = isinstance(data, dict) and part in data
        known = known or (isinstance(data, list) and isinstance(part, int) and part < len(data))
        missing = isinstance(data, dict) and step == len(location) - 1
        if known or missing:
            parts.append(str(part)[:40])
        if known:
            data = data[part]
    return ".".join(parts).encode("ascii", "replace").decode("ascii") or None


class ErrorBoundary:
    """Pure ASGI middleware: what a route raises becomes a response, and nothing gets past it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the app; answer what it raises unless a response has started."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = False

        async def watched_send(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched_send)
        except Exception as error:
            note_error(scope, error)
            response = error_response(error)
            if not started:
                await response(scope, receive, send)


def add_error_handlers(app: FastAPI) -> None:
    """Give the app's own errors (404, 405, …) and ours OpenAI's shape."""

    async def handle(request: Request, error: Exception) -> ASCIIResponse:
        note_error(request.scope, error)
        return error_response(error)

    async def handle_http(request: Request, error: Exception) -> ASCIIResponse:
        assert isinstance(error, HTTPException)
        message = _UNKNOWN_ROUTE if error.status_code == 404 else _phrase(error.status_code)
        body = error_body(message, "invalid_request_error")
        return respond(error.status_code, body, error.headers)

    app.add_exception_handler(MMEngineError, handle)
    app.add_exception_handler(HTTPException, handle_http)


def _phrase(status: int) -> str:
    if status == 405:
        return "this route takes another method. See /openapi.json."
    return f"{HTTPStatus(status).phrase.lower()}. See /openapi.json."
