"""What waits is bounded by its tokens, too, and nobody holds a place by not reading."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mm_engine.config import default_queued_requests
from serving import ServerProcess, wait_until

COMPLETIONS = "/v1/completions"
LONG: dict[str, Any] = {"prompt": "circle", "ignore_eos": True, "max_tokens": 4000, "stream": True}
#: Forty tokens or so, each time others: none is found in the cache.
SHORT: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0}


def prompt(number: int, num_tokens: int) -> list[int]:
    return [5 + (number + i * i) % 200 for i in range(num_tokens)]


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that runs one sequence, and lets a hundred tokens of prompts wait."""
    flags = ("--max-num-seqs", "1", "--max-queued-tokens", "100", "--kv-cache-memory", "64MiB")
    with ServerProcess(tmp_path_factory.mktemp("narrow"), *flags) as started:
        yield started


def test_tokens_that_wait_are_bounded(narrow: ServerProcess) -> None:
    """Row 24: those beyond are told when to come again, and the others are answered."""
    statuses: list[int] = []

    def ask(number: int, num_tokens: int) -> Any:
        body = SHORT | {"prompt": prompt(number, num_tokens)}
        return narrow.http.post(COMPLETIONS, json=body)

    with narrow.http.stream("POST", COMPLETIONS, json=LONG) as running:
        lines = running.iter_lines()
        next(lines)  # its prompt is through, and counts no longer
        threads = [
            threading.Thread(target=lambda n=n: statuses.append(ask(n, 40).status_code))
            for n in (1, 2)
        ]
        for thread in threads:
            thread.start()
        wait_until(lambda: narrow.metric("mm_engine_num_queued_tokens") == 80, "two to wait")
        refused = ask(3, 40)
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert "80 tokens of prompts wait" in refused.json()["error"]["message"]
        lines.close()
    for thread in threads:
        thread.join()
    assert statuses == [200, 200]
    wait_until(lambda: narrow.metric("mm_engine_num_queued_tokens") == 0, "none to wait")
    assert ask(4, 40).status_code == 200


def test_a_request_that_is_given_up_takes_its_tokens_with_it(narrow: ServerProcess) -> None:
    with narrow.http.stream("POST", COMPLETIONS, json=LONG) as running:
        lines = running.iter_lines()
        next(lines)
        body = SHORT | {"prompt": prompt(5, 90), "timeout": 0.3}
        assert narrow.http.post(COMPLETIONS, json=body).status_code == 504
        assert narrow.metric("mm_engine_num_queued_tokens") == 0
        lines.close()


def test_a_prompt_over_the_limit_is_taken_where_nothing_waits(narrow: ServerProcess) -> None:
    body = SHORT | {"prompt": prompt(7, 300)}
    assert narrow.http.post(COMPLETIONS, json=body).status_code == 200
    assert narrow.metric("mm_engine_num_queued_tokens") == 0


@pytest.mark.parametrize(("max_num_seqs", "places"), [(1, 16), (16, 16), (17, 17), (256, 256)])
def test_as_many_are_taken_in_as_run_at_once_and_a_few_always(
    max_num_seqs: int, places: int
) -> None:
    assert default_queued_requests(max_num_seqs) == places


def test_a_server_takes_in_no_more_unless_told_so(narrow: ServerProcess) -> None:
    assert narrow.metric("mm_engine_max_queued_prompts") == default_queued_requests(1)


def test_a_client_that_doesnt_read_is_let_go(tmp_path: Path) -> None:
    """Its answer is larger than all buffers on its way; then its place is free again."""
    with ServerProcess(tmp_path, settings={"send_timeout": 1.0}) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps(LONG | {"n": 16, "logprobs": 5}).encode()
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            wait_until(lambda: server.metric("mm_engine_num_requests_in_flight") == 1, "it to run")
            start = time.monotonic()
            wait_until(lambda: server.is_idle, "it to be let go", 60)
            assert time.monotonic() - start > 0.9  # it had its time
            received = b"".join(iter(lambda: connection.recv(2**16), b""))  # and it is closed
        assert received.startswith(b"HTTP/1.1 200") and b"[DONE]" not in received
        wait_until(lambda: "POST /v1/completions 499" in server.output, "the log's line")
        assert "Traceback" not in server.output
        assert server.http.post(COMPLETIONS, json=SHORT | {"prompt": "x"}).status_code == 200
