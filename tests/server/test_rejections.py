"""What `/metrics` counts of requests that weren't taken, of the queue, and of HTTP as such."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from mm_engine.errors import EngineDead, Overloaded, PluginError, RequestError
from mm_engine.inputs.processed_items import ProcessedItems
from mm_engine.plugins.record import PluginRecord
from mm_engine.server.errors import REJECTIONS, rejection_of
from mm_engine.server.metrics import SECONDS, TOKENS, Metrics
from pictures import data_url, encode, quarters
from serving import KEY, ServerProcess, wait_until

COMPLETIONS = "/v1/completions"
GOOD: dict[str, Any] = {"prompt": "circle", "max_tokens": 1}
LONG = {"prompt": "circle", "max_tokens": 3000, "ignore_eos": True, "stream": True}


def rejected(server: ServerProcess, key: str | None = None) -> dict[str, float]:
    name = "mm_engine_requests_rejected_total"
    return {reason: server.metric(f'{name}{{reason="{reason}"}}', key=key) for reason in REJECTIONS}


def grown(now: dict[str, float], before: dict[str, float]) -> dict[str, float]:
    return {reason: now[reason] - before[reason] for reason in now if now[reason] != before[reason]}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (GOOD, None),
        ({**GOOD, "n": 0}, "invalid"),
        ({**GOOD, "prompt": [5] * 5000}, "invalid"),
        ({**GOOD, "model": "another"}, "unknown_model"),
    ],
)
def test_a_refusal_counts_with_its_reason(
    server: ServerProcess, body: dict[str, Any], reason: str | None
) -> None:
    before = rejected(server)
    response = server.http.post(COMPLETIONS, json=body)
    assert response.is_success == (reason is None)
    assert grown(rejected(server), before) == ({reason: 1} if reason else {})


def test_what_stands_before_the_routes_counts_too(strict: ServerProcess) -> None:
    before = rejected(strict, KEY)
    assert httpx.post(f"{strict.url}{COMPLETIONS}", json=GOOD).status_code == 401
    large = strict.http.post(COMPLETIONS, content=b" " * (32 * 2**20 + 1))
    assert large.status_code == 413
    assert httpx.get(f"{strict.url}/v1/models").status_code == 401  # asks for no completion
    assert grown(rejected(strict, KEY), before) == {"api_key": 1, "body_too_large": 1}


def test_a_full_queue_is_seen_and_what_it_refuses(strict: ServerProcess) -> None:
    def metric(name: str) -> float:
        return strict.metric(f"mm_engine_{name}", KEY)

    wait_until(lambda: strict.is_idle, "the last test's prompts to leave")
    before = rejected(strict, KEY)
    assert (metric("num_queued_prompts"), metric("max_queued_prompts")) == (0, 2)
    with strict.http.stream("POST", COMPLETIONS, json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        assert metric("num_queued_prompts") == 1
        two = strict.http.post(COMPLETIONS, json={**GOOD, "prompt": ["a", "b"]})
        assert two.status_code == 429
    wait_until(lambda: metric("num_queued_prompts") == 0, "its place")
    assert grown(rejected(strict, KEY), before) == {"queue_full": 1}


def test_a_plugins_fault_is_no_refusal(strict: ServerProcess) -> None:
    before, faults = rejected(strict, KEY), strict.metric("mm_engine_plugin_errors_total")
    for width, status in ((12, 200), (13, 500)):
        part = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(width, 16)))}}
        body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 2}
        assert strict.http.post("/v1/chat/completions", json=body).status_code == status
    assert strict.metric("mm_engine_plugin_errors_total") == faults + 1
    assert grown(rejected(strict, KEY), before) == {}


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RequestError("no"), "invalid"),
        (RequestError("no", status=404, code="model_not_found"), "unknown_model"),
        (RequestError("no", status=404, code="not_offered"), "not_offered"),
        (RequestError("no", status=408), "body_too_slow"),
        (RequestError("no", status=413), "body_too_large"),
        (Overloaded("later"), "queue_full"),
        (Overloaded("later", status=503, reason="draining"), "draining"),
        (Overloaded("later", reason="key_limit"), "key_limit"),
        (EngineDead("x"), "engine_dead"),
        (PluginError("x"), None),
        (ValueError("x"), None),
    ],
)
def test_each_error_has_its_reason(error: Exception, reason: str | None) -> None:
    assert rejection_of(error) == reason
    assert reason is None or reason in REJECTIONS


def test_http_requests_are_timed_by_route(server: ServerProcess) -> None:
    def count(route: str) -> float:
        server.http.get(route)  # so that there is one
        return server.metric(f'mm_engine_http_request_duration_seconds_count{{route="{route}"}}')

    assert count("/version") == count("/version") - 1


def test_the_process_and_the_build_are_told(server: ServerProcess) -> None:
    version = metadata.version("mm-engine")
    assert server.metric(f'mm_engine_build_info{{version="{version}"}}') == 1
    start = server.metric("mm_engine_start_time_seconds")
    assert start == pytest.approx(server.metric("process_start_time_seconds"), abs=300)
    assert server.metric("process_resident_memory_bytes") > 2**20
    assert server.metric("process_open_fds") > 3


def test_every_metric_says_what_it_is_and_in_which_unit(server: ServerProcess) -> None:
    families = list(text_string_to_metric_families(server.http.get("/metrics").text))
    names = [family.name for family in families]
    assert len(names) > 40
    assert [name for name in names if names.count(name) > 1] == []
    assert [family.name for family in families if not family.documentation.strip()] == []
    prefixes = ("mm_engine_", "process_")
    assert [name for name in names if not name.startswith(prefixes)] == []


def test_histograms_are_named_by_their_unit() -> None:
    metrics = Metrics(PluginRecord("mm-x", "1.0", "X", "mm_x.plugin"), ProcessedItems(0))
    metrics.http_seconds.labels("/health")
    units = {}
    for family in metrics.registry.collect():
        bounds = [sample.labels["le"] for sample in family.samples if "le" in sample.labels]
        if bounds:
            units[family.name] = bounds[0]
    assert len(units) >= 9
    first = {"seconds": str(float(SECONDS[0])), "tokens": str(float(TOKENS[0]))}
    assert all(first[name.rpartition("_")[2]] == bound for name, bound in units.items())
