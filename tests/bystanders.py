"""Whoever else is asking at the time, and what a server holds: both as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Iterator
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
