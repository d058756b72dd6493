"""The routes that tell about the server."""

from __future__ import annotations

import dataclasses
import re
from importlib import metadata

import pytest
from openai import OpenAI

from mm_engine.contract import contract_version
from mm_engine.plugins.discovery import installed
from mm_engine.server.app import ROUTES
from serving import ServerProcess, wait_until


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
        "e2e_request_latency_seconds_count",
        "time_to_first_token_seconds_count",
        "inter_token_latency_seconds_count",
        "request_queue_time_seconds_count",
        "request_prefill_time_seconds_count",
        "request_decode_time_seconds_count",
        "request_time_per_output_token_seconds_count",
        "request_prompt_tokens_count",
        "request_prompt_tokens_sum",
        "request_generation_tokens_sum",
        'request_success_total{finished_reason="length"}',
        'request_success_total{finished_reason="abort"}',
    )
    ask = {"model": "demo", "max_tokens": 5, "extra_body": {"ignore_eos": True}}
    before = [server.metric(f"mm_engine_{name}") for name in names]
    answer = client.completions.create(**ask, prompt="circle")
    assert answer.usage
    grown = [
        server.metric(f"mm_engine_{name}") - old for name, old in zip(names, before, strict=True)
    ]
    num_prompt = answer.usage.prompt_tokens
    assert grown == [num_prompt, 5, 1, 1, 4, 1, 1, 1, 1, 1, num_prompt, 5, 1, 0]


def test_parts_of_an_answers_time_add_up(server: ServerProcess, client: OpenAI) -> None:
    def seconds(name: str) -> float:
        return server.metric(f"mm_engine_{name}_seconds_sum")

    names = (
        "request_queue_time",
        "request_prefill_time",
        "request_decode_time",
        "time_to_first_token",
        "inter_token_latency",
        "request_time_per_output_token",
    )
    before = [seconds(name) for name in names]
    client.completions.create(
        model="demo", prompt="circle", max_tokens=9, extra_body={"ignore_eos": True}
    )
    queue, prefill, decode, first, between, mean = (
        seconds(name) - old for name, old in zip(names, before, strict=True)
    )
    assert queue > 0 and prefill > 0  # how much of each is the machine's affair
    assert queue + prefill <= first  # which has the way to the engine and back on top
    assert decode == pytest.approx(between) == pytest.approx(8 * mean)


def test_an_answer_that_nobody_waits_for_counts_as_aborted(server: ServerProcess) -> None:
    name = 'mm_engine_request_success_total{finished_reason="abort"}'
    before = server.metric(name)
    body = {"prompt": "circle", "max_tokens": 3000, "ignore_eos": True, "n": 2, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        assert server.metric(name) == before
    wait_until(lambda: server.metric(name) == before + 2, "two aborted completions")


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
    assert {"ResponseRequest", "TokenizeRequest", "DetokenizeRequest"} <= references
    assert references <= set(document["components"]["schemas"])


@pytest.mark.parametrize(
    ("method", "path", "statuses"),
    [
        ("post", "/v1/responses", "200 400 401 404 408 413 429 500 503 504"),
        ("post", "/tokenize", "200 400 401 404 408 413 429 500 503 504"),
        ("post", "/detokenize", "200 400 401 404 408 413 429 500 503 504"),
        ("get", "/v1/responses/{response_id}", "401 404 413"),
        ("delete", "/v1/responses/{response_id}", "401 404 413"),
        ("post", "/v1/embeddings", "401 404 413"),
    ],
)
def test_openapi_tells_every_status_of_the_newer_routes(
    server: ServerProcess, method: str, path: str, statuses: str
) -> None:
    operation = server.http.get("/openapi.json").json()["paths"][path][method]
    assert " ".join(sorted(operation["responses"])) == statuses
    assert ("200" in operation["responses"]) == ("requestBody" in operation)
    assert operation["description"]


def test_plugins_tell_the_served_one_and_what_else_is_installed(server: ServerProcess) -> None:
    answer = server.http.get("/v1/plugins").json()
    assert (answer["object"], answer["contract"]) == ("list", contract_version())
    served, *others = answer["data"]
    assert served == {
        "distribution": "mm-llava",
        "version": metadata.version("mm-llava"),
        "architecture": "LlavaForConditionalGeneration",
        "module": "mm_llava.plugin",
        "served": True,
        "hooks": ["model_class", "max_tokens"],
        "max_tokens": {"image": served["max_tokens"]["image"]},
    }
    assert served["max_tokens"]["image"] > 1
    expected = [
        {**dataclasses.asdict(record), "served": False}
        for record in installed()
        if record.architecture != "LlavaForConditionalGeneration"
    ]
    for record in expected:
        del record["path"]
    assert others == expected


def test_a_plugin_in_a_file_is_told_without_its_path(strict: ServerProcess) -> None:
    answer = strict.http.get("/v1/plugins")
    served, *others = answer.json()["data"]
    assert (served["distribution"], served["module"]) == ("faulty.py", "mm_engine_file_faulty")
    assert served["version"].startswith("sha256:")
    assert served["hooks"] == ["model_class", "max_tokens", "input_processor"]
    assert "mm-llava" in {card["distribution"] for card in others}  # installed, passed over
    assert "/" not in answer.text


def test_metrics_carry_the_plugin(server: ServerProcess) -> None:
    text = server.http.get("/metrics").text
    (line,) = [row for row in text.splitlines() if row.startswith("mm_engine_plugin_info")]
    assert line == (
        'mm_engine_plugin_info{architecture="LlavaForConditionalGeneration",'
        f'contract="{contract_version()}",distribution="mm-llava",'
        f'version="{metadata.version("mm-llava")}"}} 1.0'
    )
