"""OpenAI's routes that this server doesn't have: each says so, and what there is instead."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from mm_engine.errors import RequestError

_ANSWERS = "This server answers with text: POST /v1/chat/completions, /v1/responses."
_IN_BODY = "Send images along with a question about them: POST /v1/chat/completions."
_NOTHING_KEPT = "This server keeps nothing: POST /v1/chat/completions or /v1/responses."
#: What is behind each of these paths at OpenAI, and what to do here.
NOT_OFFERED = {
    "/v1/embeddings": ("embeddings", _ANSWERS),
    "/v1/audio": ("speech, transcription and translation", _ANSWERS),
    "/v1/images": ("making and editing images", _IN_BODY),
    "/v1/videos": ("making videos", _ANSWERS),
    "/v1/moderations": ("moderation", _ANSWERS),
    "/v1/files": ("keeping files", _IN_BODY),
    "/v1/uploads": ("keeping files", _IN_BODY),
    "/v1/vector_stores": ("keeping files", _IN_BODY),
    "/v1/batches": ("batches", "Send the requests side by side: this server batches them itself."),
    "/v1/fine_tuning": ("fine-tuning", "Train elsewhere, and serve the checkpoint: engine serve."),
    "/v1/assistants": ("keeping assistants", _NOTHING_KEPT),
    "/v1/threads": ("keeping conversations", _NOTHING_KEPT),
    "/v1/conversations": ("keeping conversations", _NOTHING_KEPT),
    "/v1/realtime": ("speech in real time", _ANSWERS),
    "/v1/responses/input_tokens": ("counting tokens here", "Send messages to POST /tokenize."),
    "/v1/responses/compact": ("shortening conversations", "Send fewer messages."),
}
_STORED = "/v1/responses/{response_id}"
_NOT_STORED = (
    "responses are not stored by this server: there is none to get, cancel or delete. "
    "Keep what POST /v1/responses answers."
)
_ID = {"name": "response_id", "in": "path", "required": True, "schema": {"type": "string"}}
_ERROR = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}


class _Refusal:
    """An ASGI app that refuses a request of any method, whatever is in its body."""

    def __init__(self, template: str, message: str, code: str) -> None:
        self._template = template
        self._message = message
        self._code = code

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Do it.

        Raises:
            RequestError: always, 404.
        """
        scope.setdefault("mm_engine.notes", {})["route"] = self._template
        raise RequestError(self._message, status=404, code=self._code)


def add_not_offered_routes(app: FastAPI) -> None:
    """Refuse what is in `NOT_OFFERED` and stored responses, with any method and what follows.

    The OpenAPI document gets what clients begin with: POST to what isn't offered, GET and DELETE of
    a stored response.
    """
    for path, (what, instead) in NOT_OFFERED.items():
        message = f"not offered by this server: {what}. {instead}"
        _refuse(app, path, message, "not_offered")
        _describe(app, path, "post", message)
    _refuse(app, _STORED, _NOT_STORED, "not_stored")
    for method in ("get", "delete"):
        _describe(app, _STORED, method, _NOT_STORED, parameters=[_ID])


def _refuse(app: FastAPI, path: str, message: str, code: str) -> None:
    for template, route in ((path, path), (f"{path}/{{rest}}", f"{path}/{{rest:path}}")):
        refusal = _Refusal(template, message, code)
        app.router.routes.append(Route(route, refusal, include_in_schema=False))


def _describe(app: FastAPI, path: str, method: str, message: str, **more: Any) -> None:
    app.openapi()["paths"].setdefault(path, {})[method] = {  # made once, then kept
        "summary": "Not offered",
        "description": message,
        "operationId": f"refuse_{method}_{path.strip('/').replace('/', '_')}",
        "responses": {
            str(status): {"description": HTTPStatus(status).phrase, "content": _ERROR}
            for status in (401, 404, 413)
        },
        **more,
    }
