"""The HTTP application: which routes there are, and what stands before them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from pydantic import BaseModel
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from mm_engine.errors import EngineDead
from mm_engine.plugins.blame import no_more_calls
from mm_engine.server.access_log import AccessLog
from mm_engine.server.chat import open_chat
from mm_engine.server.completions import open_completion
from mm_engine.server.errors import ErrorBoundary, add_error_handlers
from mm_engine.server.exchange import Exchange
from mm_engine.server.keys import ApiKey
from mm_engine.server.limits import BodyLimit
from mm_engine.server.not_offered import NOT_OFFERED, add_not_offered_routes
from mm_engine.server.plugin_list import plugin_list
from mm_engine.server.protocol import ChatRequest, CompletionRequest
from mm_engine.server.request_id import RequestId
from mm_engine.server.response_api import open_response
from mm_engine.server.response_objects import ResponseObject
from mm_engine.server.response_protocol import ResponseRequest
from mm_engine.server.responses import (
    ChatCompletion,
    Completion,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    PluginList,
    Version,
)
from mm_engine.server.service import Service
from mm_engine.server.settings import ServerSettings
from mm_engine.server.tokenize import (
    Detokenized,
    DetokenizeRequest,
    Errand,
    TokenizeRequest,
    Tokens,
    detokenize,
    tokenize,
)

if TYPE_CHECKING:
    from mm_engine.engine.client import EngineClient
    from mm_engine.engine.status import EngineStats
    from mm_engine.inputs.pipeline import InputPipeline

_REFERENCE = "#/components/schemas/{model}"
STATS_TIMEOUT = 2.0  # seconds that a scrape waits for the engine's numbers
ROUTES = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/responses",
        "/tokenize",
        "/detokenize",
        *NOT_OFFERED,
        "/v1/models",
        "/v1/plugins",
        "/health",
        "/ready",
        "/version",
        "/metrics",
        "/openapi.json",
    }
)


def create_app(client: EngineClient, pipeline: InputPipeline, settings: ServerSettings) -> FastAPI:
    """The application that serves `client`'s engine; `app.state.service` is its `Service`."""
    service = Service(client, pipeline, settings)
    middleware = [
        Middleware(RequestId),
        *_tracing(service),
        Middleware(AccessLog, metrics=service.metrics, routes=ROUTES),
        *([_cors(settings.allowed_origins)] if settings.allowed_origins else []),
        Middleware(ErrorBoundary),
        *([Middleware(ApiKey, keys=settings.api_keys)] if settings.api_keys else []),
        Middleware(BodyLimit, max_bytes=settings.max_body_bytes),
    ]
    app = FastAPI(
        title="mm-engine",
        version=metadata.version("mm-engine"),
        docs_url=None,  # these pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        middleware=middleware,
    )
    app.state.service = service
    add_error_handlers(app)
    _add_generation_routes(app, service)
    _add_token_routes(app, service)
    _add_information_routes(app, service)
    add_not_offered_routes(app)
    _add_body_schemas(app)
    return app


def _tracing(service: Service) -> list[Middleware]:
    """What traces requests, if that was asked for; else nothing of it is imported."""
    endpoint = service.settings.otlp_traces_endpoint
    if endpoint is None:
        return []
    from mm_engine.server.tracing import TraceRequests, Traces, check_endpoint

    service.traces = Traces(check_endpoint(endpoint))
    return [Middleware(TraceRequests, traces=service.traces, model=service.model_name)]


def _cors(origins: Sequence[str]) -> Middleware:
    """Before the key: a browser asks for leave without one. Keys aren't cookies."""
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # clients send headers of their own
        expose_headers=["X-Request-Id"],
    )


def _add_generation_routes(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", **_described(ChatRequest, ChatCompletion))
    async def create_chat_completion() -> Response:
        """Answer a conversation, images included."""
        return Exchange(service, open_chat)

    @app.post("/v1/completions", **_described(CompletionRequest, Completion))
    async def create_completion() -> Response:
        """Continue one or several prompts."""
        return Exchange(service, open_completion)

    @app.post("/v1/responses", **_described(ResponseRequest, ResponseObject))
    async def create_response() -> Response:
        """Answer a conversation, images included. The response isn't stored."""
        return Exchange(service, open_response)


def _add_token_routes(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", **_described(TokenizeRequest, Tokens, streams=False))
    async def tokenize_prompt() -> Response:
        """The token ids of a prompt or of a conversation, images included."""
        return Errand(service, tokenize)

    @app.post("/detokenize", **_described(DetokenizeRequest, Detokenized, streams=False))
    async def detokenize_ids() -> Response:
        """The text of token ids."""
        return Errand(service, detokenize)


def _add_information_routes(app: FastAPI, service: Service) -> None:
    started = int(time.time())
    key_errors: dict[int | str, dict[str, Any]] = {401: {"model": ErrorBody}}

    def card(name: str) -> ModelCard:
        return ModelCard(
            id=name,
            object="model",
            created=started,
            owned_by="mm-engine",
            root=service.model_name,
            max_model_len=service.pipeline.max_len,
        )

    @app.get("/v1/models", responses=key_errors)
    async def list_models() -> ModelList:
        """The names under which the model is served."""
        cards = [card(name) for name in service.settings.served_model_names]
        return ModelList(object="list", data=cards)

    @app.get("/v1/models/{name:path}", responses={**key_errors, 404: {"model": ErrorBody}})
    async def retrieve_model(name: str) -> ModelCard:
        """One of these names."""
        service.check_model(name)
        return card(name)

    @app.get("/v1/plugins", responses=key_errors, response_model_exclude_unset=True)
    async def list_plugins() -> PluginList:
        """The plugin that serves the model, and what else is installed (none of it imported)."""
        return await service.in_thread(lambda: plugin_list(service.pipeline))

    @app.get("/health", responses={503: {"model": ErrorBody}})
    async def health() -> Health:
        """Whether the server lives: 503 if the engine is gone, or too many hooks of plugins hang.

        One that shuts down lives until it has.
        """
        service.check_alive()
        if no_more_calls():
            raise EngineDead(
                "too many calls of the plugin's hooks were given up on and still run. "
                "Restart the server."
            )
        return Health(status="ok")

    @app.get("/ready", responses={503: {"model": ErrorBody}})
    async def ready() -> Health:
        """Whether requests are taken: 503 while an engine is started and while it shuts down."""
        service.check_ready()
        return Health(status="ok")

    @app.get("/version", responses=key_errors)
    async def show_version() -> Version:
        """The version of mm-engine."""
        return Version(version=metadata.version("mm-engine"))

    @app.get("/metrics", responses=key_errors, response_class=Response)
    async def metrics() -> Response:
        """Metrics in Prometheus' text format."""
        stats = await _stats(service)
        service.metrics.tasks.set(len(asyncio.all_tasks()))
        text = service.metrics.text(stats, alive=service.client.alive)
        return Response(text, media_type="text/plain; version=0.0.4")


async def _stats(service: Service) -> EngineStats | None:
    """The engine's numbers; None if it is gone, or busy with a long step."""
    if not service.client.alive:
        return None
    try:
        async with asyncio.timeout(STATS_TIMEOUT):
            return await service.client.stats()
    except (TimeoutError, EngineDead):
        return None


def _described(request: type[BaseModel], response: type, *, streams: bool = True) -> dict[str, Any]:
    """How OpenAPI describes a route whose body is read by the route itself."""
    schema = {"$ref": _REFERENCE.format(model=request.__name__)}
    return {
        "response_model": None,
        "openapi_extra": {
            "requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}
        },
        "responses": {
            200: {
                "model": response,
                "description": "The answer, or a stream of events" if streams else "The answer",
                "content": {"text/event-stream": {}} if streams else {},
            },
            **{s: {"model": ErrorBody} for s in (400, 401, 404, 408, 413, 429, 500, 503, 504)},
        },
    }


def _add_body_schemas(app: FastAPI) -> None:
    """Put the schemas that `_described` refers to into the OpenAPI document."""
    for shape in (
        ChatRequest,
        CompletionRequest,
        ResponseRequest,
        TokenizeRequest,
        DetokenizeRequest,
    ):
        schema = shape.model_json_schema(ref_template=_REFERENCE)
        schemas = {**schema.pop("$defs", {}), shape.__name__: schema}
        app.openapi()["components"]["schemas"].update(schemas)  # made once, then kept
