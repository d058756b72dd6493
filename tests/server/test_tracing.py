"""Traces: a real server sends them to a real collector, a web server that reads the protobuf."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import forking
from mm_engine.errors import StartupError
from mm_engine.server import tracing
from mm_engine.server.tracing import OPERATIONS, check_endpoint
from pictures import data_url, encode, quarters
from serving import ENGINE, FLAGS, ServerProcess, environment, wait_until

SECRET = "s3cr3t"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
REASON = "OpenTelemetry isn't installed: pip install 'mm-engine[otel]'"
NANO = 1e-9


@dataclass
class Span:
    """One span as it arrived."""

    name: str
    trace: str
    id: str
    parent: str
    start: float  # seconds
    end: float
    kind: int
    status: int
    attributes: dict[str, Any]
    service: str


@dataclass
class Collector:
    """What has arrived at a collector of OpenTelemetry's protocol."""

    url: str = ""
    spans: list[Span] = field(default_factory=list)
    bodies: list[bytes] = field(default_factory=list)
    paths: set[str] = field(default_factory=set)

    def take(self, path: str, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1 import trace_service_pb2

        self.paths.add(path)
        self.bodies.append(body)
        for of_resource in trace_service_pb2.ExportTraceServiceRequest.FromString(
            body
        ).resource_spans:
            service = values(of_resource.resource.attributes)["service.name"]
            for scope in of_resource.scope_spans:
                self.spans += [read(span, service) for span in scope.spans]

    def family(self, name: str, value: str) -> tuple[Span, list[Span]]:
        """The span with this attribute once it is there, and its parts in order."""
        found: list[Span] = []

        def arrived() -> bool:
            found[:] = [span for span in list(self.spans) if span.attributes.get(name) == value]
            return bool(found)

        wait_until(arrived, "the span")
        (root,) = found
        parts = [span for span in self.spans if span.parent == root.id]
        return root, sorted(parts, key=lambda span: (span.start, span.end))


def values(attributes: Any) -> dict[str, Any]:
    def value(given: Any) -> Any:
        kind = given.WhichOneof("value")
        if kind == "array_value":
            return [value(each) for each in given.array_value.values]
        return getattr(given, kind)

    return {attribute.key: value(attribute.value) for attribute in attributes}


def read(span: Any, service: str) -> Span:
    return Span(
        name=span.name,
        trace=span.trace_id.hex(),
        id=span.span_id.hex(),
        parent=span.parent_span_id.hex(),
        start=span.start_time_unix_nano * NANO,
        end=span.end_time_unix_nano * NANO,
        kind=span.kind,
        status=span.status.code,
        attributes=values(span.attributes),
        service=service,
    )


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.proto.collector", reason=REASON)
    pytest.importorskip("opentelemetry.sdk.trace", reason=REASON)
    collected = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            collected.take(self.path, body)
            self.send_response(200)
            self.send_header("Content-Type", "application/x-protobuf")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        collected.url = f"http://127.0.0.1:{listening.server_port}"
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield collected
        listening.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def traced(
    collector: Collector, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServerProcess]:
    flags = (*FLAGS, "--otlp-traces-endpoint", collector.url)
    env = {"OTEL_BSP_SCHEDULE_DELAY": "100"}  # milliseconds, not the 5 s that are usual
    with ServerProcess(tmp_path_factory.mktemp("traced"), *flags, env=env) as started:
        yield started


def ask_about_a_picture(server: ServerProcess, **headers: str) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(40, 40)))}}
    body = {
        "messages": [{"role": "user", "content": [picture, {"type": "text", "text": SECRET}]}],
        "max_tokens": 9,
        "temperature": 0.5,
        "seed": 7,
        "ignore_eos": True,
    }
    answer = server.http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    told: dict[str, Any] = answer.json()
    return told


def test_a_request_is_a_span_with_its_parts_in_the_clients_trace(
    traced: ServerProcess, collector: Collector
) -> None:
    before = time.time()
    answer = ask_about_a_picture(traced, traceparent=f"00-{TRACE}-{PARENT}-01")
    after = time.time()
    root, parts = collector.family("gen_ai.response.id", answer["id"])
    assert (root.name, root.service, root.kind, root.status) == ("chat demo", "mm-engine", 2, 0)
    assert (root.trace, root.parent) == (TRACE, PARENT)
    assert [part.name for part in parts] == ["input", "queue", "prefill", "decode"]
    assert {part.trace for part in parts} == {TRACE}
    moments = [moment for part in parts for moment in (part.start, part.end)]
    assert before <= root.start <= moments[0] + 1e-6
    assert moments == sorted(moments)
    assert moments[-1] <= root.end + 1e-6 <= after + 0.1
    assert all(part.end > part.start for part in parts)
    assert collector.paths == {"/v1/traces"}


def test_attributes_are_those_of_the_conventions(
    traced: ServerProcess, collector: Collector
) -> None:
    answer = ask_about_a_picture(traced, **{"X-Request-Id": "traced-1"})
    root, parts = collector.family("mm_engine.request_id", "traced-1")
    usage = answer["usage"]
    first = root.attributes.pop("mm_engine.time_to_first_token")
    assert 0 < first < root.end - root.start
    assert root.attributes == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "mm-engine",
        "gen_ai.request.model": "demo",
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.top_p": 1.0,
        "gen_ai.request.top_k": 0,
        "gen_ai.request.seed": 7,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.choice.count": 1,
        "gen_ai.response.model": "demo",
        "gen_ai.response.id": answer["id"],
        "gen_ai.response.finish_reasons": ["length"],
        "gen_ai.usage.input_tokens": usage["prompt_tokens"],
        "gen_ai.usage.output_tokens": 9,
        "gen_ai.usage.cache_read.input_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
        "mm_engine.num_images": 1,
        "mm_engine.request_id": "traced-1",
    }
    assert [part.attributes for part in parts] == [{}] + [{"mm_engine.prompt": 0}] * 3
    known = pytest.importorskip("opentelemetry.semconv._incubating.attributes.gen_ai_attributes")
    names = {name for name in vars(known).values() if isinstance(name, str)}
    assert {name for name in root.attributes if name.startswith("gen_ai.")} - names == set()


def test_nothing_that_was_said_leaves(traced: ServerProcess, collector: Collector) -> None:
    answer = ask_about_a_picture(traced, **{"X-Request-Id": "traced-2"})
    collector.family("mm_engine.request_id", "traced-2")
    everything = b"".join(collector.bodies)
    assert b"traced-2" in everything
    text = answer["choices"][0]["message"]["content"].encode()
    assert SECRET.encode() not in everything and len(text) > 3 and text not in everything


def test_each_prompt_of_a_stream_has_parts(traced: ServerProcess, collector: Collector) -> None:
    body = {"prompt": ["circle", "a red square"], "max_tokens": 4, "stream": True, "n": 2}
    body |= {"ignore_eos": True, "temperature": 0}
    headers = {"X-Request-Id": "traced-3"}
    with traced.http.stream("POST", "/v1/completions", json=body, headers=headers) as response:
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    root, parts = collector.family("mm_engine.request_id", "traced-3")
    assert root.name == "text_completion demo" and root.parent == ""
    assert f'"id":"{root.attributes["gen_ai.response.id"]}"' in lines[0]
    assert root.attributes["gen_ai.usage.output_tokens"] == 16
    names = {(part.name, part.attributes.get("mm_engine.prompt")) for part in parts}
    three = ("queue", "prefill", "decode")
    assert names == {("input", None), *((name, prompt) for name in three for prompt in (0, 1))}


def test_a_refused_request_is_a_span_and_no_error(
    traced: ServerProcess, collector: Collector
) -> None:
    body = {"prompt": "circle", "n": 0}
    traced.http.post("/v1/completions", json=body, headers={"X-Request-Id": "traced-4"})
    root, parts = collector.family("mm_engine.request_id", "traced-4")
    assert (root.attributes["http.response.status_code"], root.status) == (400, 0)
    assert "error.type" not in root.attributes
    assert [part.name for part in parts] == ["input"]


def test_the_client_decides_what_is_sampled_and_other_routes_are_not_traced(
    traced: ServerProcess, collector: Collector
) -> None:
    unwanted = {"traceparent": f"00-{TRACE}-{PARENT}-00", "X-Request-Id": "traced-5"}
    ask_about_a_picture(traced, **unwanted)
    assert traced.http.get("/v1/models").status_code == 200
    broken = {"traceparent": f"00-{SECRET}", "X-Request-Id": "traced-6"}
    ask_about_a_picture(traced, **broken)
    root, _ = collector.family("mm_engine.request_id", "traced-6")
    assert root.parent == "" and root.trace != TRACE
    ids = {span.attributes.get("mm_engine.request_id") for span in collector.spans}
    assert "traced-4" in ids and "traced-5" not in ids
    roots = {s.name for s in collector.spans if s.attributes.get("http.route")}
    assert roots <= {f"{operation} demo" for operation in OPERATIONS.values()}


def test_without_a_collector_requests_are_answered_and_the_log_says_so_once(
    collector: Collector, tmp_path: Path
) -> None:
    settings = {"otlp_traces_endpoint": "http://127.0.0.1:1/v1/traces"}
    env = {"OTEL_BSP_SCHEDULE_DELAY": "50", "OTEL_EXPORTER_OTLP_TIMEOUT": "1"}
    with ServerProcess(tmp_path, settings=settings, env=env) as server:
        for _ in range(2):
            body = {"prompt": "circle", "max_tokens": 2}
            assert server.http.post("/v1/completions", json=body).status_code == 200
            wait_until(lambda: "WARNING Traces can't be sent" in server.output, "the line")
            time.sleep(0.3)
        server.http.post("/v1/completions", json=body)
        start = time.monotonic()
        assert server.terminate() == 0
        assert time.monotonic() - start < 25
        (line,) = re.findall(r".* (?:WARNING|ERROR|CRITICAL) .*", server.output)
        assert "Traces can't be sent" in line
        assert "Traceback" not in server.output and "127.0.0.1:1" not in server.output


def run_with(endpoint: str, tmp: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [ENGINE, "serve", "/no/such/model", "--port", "0"]
    command += ["--otlp-traces-endpoint", endpoint]
    return forking.run(command, timeout=60, env=environment(tmp, **variables))


def test_without_the_extra_the_flag_is_refused_with_the_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "opentelemetry").mkdir()  # a part of the namespace
    (tmp_path / "opentelemetry" / "sdk.py").write_text("raise ImportError('as if it were absent')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    done = run_with("http://127.0.0.1:4318", tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "error: --otlp-traces-endpoint needs a package that isn't installed: OpenTelemetry. "
        "pip install 'mm-engine[otel]', or leave the flag out.\n"
    )


@pytest.mark.parametrize("endpoint", ["127.0.0.1:4318", "grpc://x:1", "http://", "http://[1", "x"])
def test_what_is_no_address_is_refused(endpoint: str) -> None:
    with pytest.raises(StartupError, match="is no address of HTTP") as raised:
        check_endpoint(endpoint)
    assert endpoint not in str(raised.value).replace("http://127.0.0.1:4318/v1/traces", "")


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ("http://h:1", "http://h:1/v1/traces"),
        ("https://h/", "https://h/v1/traces"),
        ("http://h:1/v1/traces", "http://h:1/v1/traces"),
        ("http://h/api/otlp", "http://h/api/otlp"),
    ],
)
def test_a_path_is_added_where_there_is_none(
    monkeypatch: pytest.MonkeyPatch, given: str, taken: str
) -> None:
    monkeypatch.setattr(tracing, "_NEEDED", ())
    assert check_endpoint(given) == taken


@pytest.mark.parametrize("asked_for", [False, True])
def test_unless_asked_for_nothing_of_it_is_imported(asked_for: bool) -> None:
    """Others may import OpenTelemetry's API; what makes and sends spans is the extra's."""
    if asked_for:
        pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason=REASON)
    code = "import re, sys, mm_engine.cli.main, mm_engine.server.app, mm_engine.server.run\n"
    if asked_for:
        code += "from mm_engine.server.tracing import check_endpoint as c; c('http://h')\n"
    code += "found = [n for n in sys.modules if re.match('opentelemetry.(sdk|exporter)|"
    code += "mm_engine.server.tracing', n)]; print(bool(found))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120
    )
    assert done.stdout == f"{asked_for}\n"


class Broken:
    """In place of `Traces`: every call fails."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def fail(*_: Any) -> Any:
            raise RuntimeError(SECRET)

        return fail


def test_a_failure_of_tracing_is_not_the_requests() -> None:
    import asyncio

    calls = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        calls.append(scope["mm_engine.notes"])

    broken: Any = Broken()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}
    traced: Any = tracing.TraceRequests(app, broken, "demo")
    asyncio.run(traced(scope, None, None))
    assert calls == [{}]
    assert re.fullmatch("[a-z_]+", OPERATIONS["/v1/completions"])
