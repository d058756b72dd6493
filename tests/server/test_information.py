"""The routes that tell about the server."""

from __future__ import annotations

import re
from importlib import metadata

from openai import OpenAI

from mm_engine.server.app import ROUTES
from serving import ServerProcess


def test_the_model_is_listed_with_its_length(client: OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "mm-engine")
    assert model.max_model_len == 4096
    assert client.models.retrieve("demo") == model


def test_the_version_is_the_distributions(server: ServerProcess) -> None:
    assert server.http.get("/version").json() == {"version": metadata.version("mm-engine")}


def test_health_says_ok(server: ServerProcess) -> None:
    assert server.http.get("/health").json() == {"status": "ok"}


def test_metrics_count_what_happens(server: ServerProcess, client: OpenAI) -> None:
    names = (
        "prompt_tokens_total",
        "generation_tokens_total",
        "request_seconds_count",
        "time_to_first_token_seconds_count",
        "inter_token_seconds_count",
    )
    ask = {"model": "demo", "max_tokens": 5, "extra_body": {"ignore_eos": True}}
    before = [server.metric(f"mm_engine_{name}") for name in names]
    answer = client.completions.create(**ask, prompt="circle")
    assert answer.usage
    grown = [
        server.metric(f"mm_engine_{name}") - old for name, old in zip(names, before, strict=True)
    ]
    assert grown == [answer.usage.prompt_tokens, 5, 1, 1, 4]


def test_metrics_count_requests_by_route_and_status(server: ServerProcess) -> None:
    def count(route: str, status: int) -> float:
        text = server.http.get("/metrics").text
        found = re.search(
            rf'mm_engine_requests_total{{route="{re.escape(route)}",status="{status}"}} (\S+)', text
        )
        return float(found[1]) if found else 0.0

    before = count("/version", 200), count("(unknown route)", 404)
    server.http.get("/version")
    server.http.get("/nothing-here-7f3a")
    assert (count("/version", 200), count("(unknown route)", 404)) == (before[0] + 1, before[1] + 1)
    assert "7f3a" not in server.http.get("/metrics").text


def test_openapi_describes_every_route_and_resolves(server: ServerProcess) -> None:
    document = server.http.get("/openapi.json").json()
    assert ROUTES - {"/openapi.json"} <= set(document["paths"])
    references = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert {"ChatRequest", "CompletionRequest", "Message", "ErrorBody"} <= references
    assert references <= set(document["components"]["schemas"])
