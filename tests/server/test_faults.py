"""What isn't the caller's fault: a plugin that breaks its contract, or a mistake of ours."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import httpx
import pytest
from starlette.types import Receive, Scope, Send

from mm_engine.errors import EngineDead, MMEngineError, Overloaded, PluginError, RequestError
from mm_engine.log import NoTraceback
from mm_engine.server.errors import ErrorBoundary, body_of, error_response
from pictures import data_url, encode, quarters
from serving import ServerProcess, wait_until


def ask(server: ServerProcess, width: int, **fields: Any) -> httpx.Response:
    part = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(width, 16)))}}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2, **fields}
    return server.http.post("/v1/chat/completions", json=body)


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("width", [13, 14])
def test_a_plugin_that_breaks_its_contract_fails_one_request_and_is_named(
    strict: ServerProcess, width: int, stream: bool
) -> None:
    assert ask(strict, 12).status_code == 200
    response = ask(strict, width, stream=stream)
    assert response.status_code == 500
    error = response.json()["error"]
    assert error["type"] == "plugin_error"
    assert error["message"].startswith("faulty.py ")
    assert "Traceback" not in strict.output
    assert ask(strict, 12).status_code == 200
    wait_until(lambda: strict.is_idle, "everything given back")


SECRET = "s3cr3t"


async def broken(scope: Scope, receive: Receive, send: Send) -> None:
    raise KeyError(SECRET)


def test_a_mistake_of_ours_is_a_fixed_sentence_and_a_place_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def get() -> httpx.Response:
        transport = httpx.ASGITransport(ErrorBoundary(broken))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/")

    with caplog.at_level(logging.ERROR):
        response = asyncio.run(get())
    assert response.status_code == 500
    assert response.json()["error"]["message"] == "internal error. The server's log has the place."
    assert "KeyError at test_faults.py" in caplog.text
    assert SECRET not in caplog.text + response.text


def test_tracebacks_of_others_become_a_place(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("someone.else")
    caplog.handler.addFilter(NoTraceback())
    try:
        raise ValueError(SECRET)
    except ValueError:
        logger.exception("in %s", "here")
    assert "in here: ValueError at test_faults.py" in caplog.text
    assert SECRET not in caplog.text
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize(
    ("error", "status", "kind"),
    [
        (RequestError("no"), 400, "invalid_request_error"),
        (RequestError("no", status=413), 413, "invalid_request_error"),
        (Overloaded("later"), 429, "overloaded_error"),
        (Overloaded("later", status=503), 503, "overloaded_error"),
        (PluginError("x"), 500, "plugin_error"),
        (EngineDead("x"), 503, "engine_dead"),
    ],
)
def test_each_class_of_error_has_its_status(error: MMEngineError, status: int, kind: str) -> None:
    answered, body = body_of(error)
    assert (answered, body["error"]["type"]) == (status, kind)
    assert ("retry-after" in error_response(error).headers) == isinstance(error, Overloaded)
