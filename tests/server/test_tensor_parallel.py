"""`engine serve` over two processes: it answers, it ends with its ranks, and they with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from serving import ServerProcess, sse_events, wait_until


def children_of(pid: int) -> list[int]:
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in listed.stdout.split()]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """The demo, shared out to real processes."""
    # Not started again, and with no time in which /health tells of it.
    settings = {"max_engine_restarts": 0, "dead_engine_timeout": 1.0}
    config = {"dtype": "float32", "tensor_parallel_size": 2}
    with ServerProcess(tmp_path, settings=settings, config=config) as server:
        server.children += children_of(server.children[0])  # the other rank is the engine's child
        assert len(server.children) == 2
        yield server


def test_it_answers_and_leaves_nothing(server: ServerProcess) -> None:
    body = {"prompt": "circle", "max_tokens": 8, "temperature": 0}
    first, second = (server.http.post("/v1/completions", json=body).json() for _ in range(2))
    assert first["usage"]["completion_tokens"] > 0
    assert first["choices"] == second["choices"]
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    wait_until(lambda: server.leftovers() == [], "all processes and folders to be gone")
    assert "Traceback" not in server.output


@pytest.mark.parametrize("busy", [True, False], ids=["in-a-stream", "idle"])
def test_a_killed_rank_ends_the_server_with_one_clear_error(
    server: ServerProcess, busy: bool
) -> None:
    told = "tensor-parallel rank 1 ended: killed by SIGKILL"
    rank = server.children[1]
    if busy:
        body = {"prompt": "circle", "max_tokens": 1000, "ignore_eos": True, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            events = sse_events(response.iter_lines())
            next(events)
            os.kill(rank, signal.SIGKILL)
            rest = list(events)
        assert '"error"' in "".join(rest) and told in "".join(rest)
    else:
        os.kill(rank, signal.SIGKILL)
    assert server.process.wait(60) != 0
    assert len(re.findall(rf"ERROR.*{told}", server.output)) == 1
    wait_until(lambda: server.leftovers() == [], "all processes and folders to be gone")
    with pytest.raises(httpx.TransportError):
        server.http.get("/health")
