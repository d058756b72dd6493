"""A request's time: in its header, in its body, or the server's. Row 28 of the robustness table."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serving import ServerProcess, sse_events, wait_until

COMPLETIONS = "/v1/completions"
#: Takes seconds: the demo is fast, but not that fast.
LONG: dict[str, Any] = {"prompt": "circle", "ignore_eos": True, "max_tokens": 4000}
SHORT: dict[str, Any] = {"prompt": "circle", "max_tokens": 4, "temperature": 0.0}
MESSAGE = "the request's time is over: 0.3 s. Ask for a shorter answer, or allow more time."


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that runs one sequence at a time, and gives each request three seconds."""
    folder = tmp_path_factory.mktemp("slow")
    flags = ("--max-num-seqs", "1", "--max-request-seconds", "3", "--kv-cache-memory", "64MiB")
    with ServerProcess(folder, *flags) as started:
        yield started


def error_of(text: str) -> dict[str, Any]:
    return dict(json.loads(text)["error"])


@pytest.mark.parametrize("where", ["header", "body", "both, the earlier counts"])
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_when_its_time_is_over(
    server: ServerProcess, where: str, stream: bool
) -> None:
    body, headers = LONG | {"stream": stream, "n": 8}, {}
    if where != "body":
        headers["X-Request-Timeout"] = "0.3"
    if where != "header":
        body["timeout"] = 0.3 if where == "body" else 60
    start = time.monotonic()
    answer = server.http.post(COMPLETIONS, json=body, headers=headers)
    assert time.monotonic() - start < 60
    if stream:
        assert answer.status_code == 200
        events = list(sse_events(iter(answer.text.splitlines())))
        assert len(events) > 1 and "[DONE]" not in events
        error = error_of(events[-1])
    else:
        assert answer.status_code == 504
        error = error_of(answer.text)
    assert (error["message"], error["type"]) == (MESSAGE, "timeout_error")
    wait_until(lambda: server.is_idle, "the engine to be idle", 10)


def test_without_one_the_same_answer_is_whole(server: ServerProcess) -> None:
    answer = server.http.post(COMPLETIONS, json=SHORT | {"timeout": 60})
    assert answer.status_code == 200
    assert answer.json()["choices"] == server.http.post(COMPLETIONS, json=SHORT).json()["choices"]


def test_the_servers_own_limit_counts_too(slow: ServerProcess) -> None:
    start = time.monotonic()
    answer = slow.http.post(COMPLETIONS, json=LONG | {"timeout": 100, "n": 64})
    assert answer.status_code == 504 and "3 s" in error_of(answer.text)["message"]
    assert 2.5 < time.monotonic() - start < 60
    assert slow.http.post(COMPLETIONS, json=SHORT).status_code == 200


def test_time_in_the_queue_counts(slow: ServerProcess) -> None:
    """It never runs: another has the only place."""
    first: list[int] = []
    thread = threading.Thread(
        target=lambda: first.append(slow.http.post(COMPLETIONS, json=LONG | {"n": 64}).status_code)
    )
    thread.start()
    wait_until(lambda: slow.metric("mm_engine_num_requests_running") == 1, "the first to run")
    waiting = slow.metric("mm_engine_num_requests_waiting")
    answer = slow.http.post(COMPLETIONS, json=SHORT, headers={"X-Request-Timeout": "0.3"})
    assert (answer.status_code, error_of(answer.text)["message"]) == (504, MESSAGE)
    wait_until(  # a step later at most
        lambda: slow.metric("mm_engine_num_requests_waiting") <= waiting, "it to leave the queue"
    )
    thread.join()
    assert first == [504]
    wait_until(lambda: slow.is_idle, "the engine to be idle", 10)


def test_a_body_that_takes_its_time_is_within_it(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nX-Request-Timeout: 0.3\r\n"
        connection.sendall(head.encode() + b"Content-Length: 9\r\n\r\n{")
        assert connection.recv(2**12).startswith(b"HTTP/1.1 504 ")


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_header_that_is_no_time_is_refused(server: ServerProcess, value: str) -> None:
    answer = server.http.post(COMPLETIONS, json=SHORT, headers={"X-Request-Timeout": value})
    assert answer.status_code == 400
    assert error_of(answer.text)["param"] == "X-Request-Timeout"


@pytest.mark.parametrize("value", [0, -1, "1", True, [1]])
def test_a_field_that_is_no_time_is_refused(server: ServerProcess, value: Any) -> None:
    answer = server.http.post(COMPLETIONS, json=SHORT | {"timeout": value})
    assert (answer.status_code, error_of(answer.text)["param"]) == (400, "timeout")
