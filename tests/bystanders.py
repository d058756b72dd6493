"""Whoever else is asking at the time, and what a server holds: both as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from serving import ServerProcess, sse_events, wait_until

ROOT = str(Path(__file__).parents[1])  # where the sources lie
SECRET = "s3cr3t"  # what bad requests carry, and nobody is to repeat
#: What no body of an error and no line of the log holds.
UNSPEAKABLE = (SECRET, "Traceback", "site-packages", ROOT, "0x7", "base64,iVBOR")
NEIGHBOUR: dict[str, Any] = {
    "prompt": "circle",
    "max_tokens": 100,
    "ignore_eos": True,
    "temperature": 0,
}
#: A second, where the machine is slow and others use it. A quiet one: benchmarks/results/leave.json
SECOND = 3.0
MAX_BLOCKS = 8  # of 16 tokens, that the neighbour takes; between two answers it takes none


def holdings(server: ServerProcess) -> dict[str, float]:
    """What the two processes hold once nobody asks: it takes a moment to be given back."""
    processes = [psutil.Process(pid) for pid in (server.process.pid, *server.children)]
    return {
        "encoder rows": server.metric("mm_engine_encoder_rows"),
        "open files": sum(process.num_fds() for process in processes),
        "connections": len(processes[0].net_connections("tcp")),
        "tasks": server.metric("mm_engine_num_tasks"),
    }


def check_error(
    response: Any, status: int | tuple[int, ...], param: str | None = None
) -> dict[str, Any]:
    """An error in OpenAI's shape, with nothing in it that isn't the client's to know."""
    statuses = (status,) if isinstance(status, int) else status
    assert response.status_code in statuses, (response.status_code, response.text[:300])
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert param is None or error["param"] == param
    assert error["message"].endswith((".", "…", ")"))
    for part in (*UNSPEAKABLE, ".py"):
        assert part not in response.text
    return dict(error)


def answer(server: ServerProcess, begun: threading.Event | None = None) -> str:
    """The neighbour's answer, streamed; `begun` is set when it has begun."""
    body = {**NEIGHBOUR, "stream": True}
    text = ""
    with (
        httpx.Client(base_url=server.url, timeout=60) as client,  # its connection ends with it
        client.stream("POST", "/v1/completions", json=body) as response,
    ):
        for event in sse_events(response.iter_lines()):
            if event != "[DONE]":
                text += json.loads(event)["choices"][0]["text"]
            if begun is not None:
                begun.set()
    return text


@contextlib.contextmanager
def undisturbed(server: ServerProcess, *, new_rows: bool = False) -> Iterator[None]:
    """Whatever is asked inside, afterwards all is as it was, and a neighbour noticed nothing.

    The same engine process; /health answers 200; answers of one who asks all the while are those
    that he gets alone; blocks, image features (unless good images make `new_rows`), files,
    connections and tasks as before; nothing in the log that isn't for it.
    """
    alone = answer(server)
    wait_until(lambda: server.is_idle, "it to be idle before")
    before, start = holdings(server), len(server.output)
    begun, over = threading.Event(), threading.Event()
    answers: list[str] = []

    def ask() -> None:
        while not over.is_set():
            answers.append(answer(server, begun))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        assert begun.wait(30), "the neighbour is answered"
        yield
    finally:
        over.set()
        thread.join()
    assert answers and set(answers) == {alone}, "the neighbour's answers are those it gets alone"
    # Others may have come: the one that compiles grammars is started with the first of them.
    assert set(server.children) <= set(server._children()), "the same engine process"
    assert server.http.get("/health").status_code == 200
    wait_until(lambda: server.is_idle, "everything given back")

    def is_as_before() -> bool:
        now = holdings(server)
        if new_rows:
            now["encoder rows"] = before["encoder rows"]
        return all(now[name] <= before[name] for name in now)

    wait_until(is_as_before, f"what it holds to be as before: {before}", 15)
    said = server.output[start:]
    assert not [part for part in UNSPEAKABLE if part in said]


@contextlib.contextmanager
def asking(server: ServerProcess, route: str, body: dict[str, Any]) -> Iterator[socket.socket]:
    """A request whose client leaves at the end, whatever has come by then."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(head.encode() + content)
        yield connection


@contextlib.contextmanager
def leaving(
    server: ServerProcess,
    route: str,
    body: dict[str, Any],
    within: float,
    *,
    num_others: int = 1,
    max_blocks: float = MAX_BLOCKS,
    also: Callable[[], bool] = lambda: True,
) -> Iterator[socket.socket]:
    """`asking`; so many seconds after its client has left, the server holds only what others do.

    By default, that is the neighbour of `undisturbed`.
    """
    start = len(server.output)
    with asking(server, route, body) as connection:
        yield connection
    left = time.monotonic()
    line = f"POST {route} 499 "
    wait_until(lambda: line in server.output[start:], "its line in the log")

    def is_back() -> bool:
        in_flight, prompts, running, waiting, blocks = server.gauges(
            "num_requests_in_flight",
            "num_queued_prompts",
            "num_requests_running",
            "num_requests_waiting",
            "num_used_blocks",
        ).values()
        others_only = max(in_flight, prompts) <= num_others and running + waiting <= prompts
        return others_only and blocks <= max_blocks and also()

    wait_until(is_back, "everything that it held to be back")
    took = time.monotonic() - left
    assert took < within, f"it took {took:.2f} s"


def wait_until_held(server: ServerProcess, **least: int) -> None:
    """Wait until there is so much of each at the same time: `num_requests_running=2`."""

    def is_held() -> bool:
        now = server.gauges(*least)
        return all(now[name] >= least[name] for name in least)

    wait_until(is_held, f"so much to be held: {least}")
