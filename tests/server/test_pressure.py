"""More than fits: of load, of one request, and of blocks in mid-decode. Rows 24, 25 and 26."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from bystanders import check_error, undisturbed
from serving import FLAGS, ServerProcess, sse_events, wait_until

COMPLETIONS = "/v1/completions"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with few blocks, that runs four requests and lets four wait."""
    flags = [*FLAGS, "--max-num-seqs", "4", "--max-queued-requests", "8"]
    flags[flags.index("--kv-cache-memory") + 1] = "8MiB"
    with ServerProcess(tmp_path_factory.mktemp("small"), *flags) as started:
        yield started


def body(number: int, max_tokens: int, **fields: Any) -> dict[str, Any]:
    prompt = f"{number} a red circle"
    return {
        "prompt": prompt,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "temperature": 0,
        **fields,
    }


def post(server: ServerProcess, request: dict[str, Any]) -> tuple[httpx.Response, float]:
    start = time.monotonic()
    with httpx.Client(base_url=server.url, timeout=120) as client:
        reply = client.post(COMPLETIONS, json=request)
    return reply, time.monotonic() - start


def text(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    if reply.headers["content-type"].startswith("text/event-stream"):
        events = [json.loads(e) for e in sse_events(iter(reply.text.splitlines())) if e != "[DONE]"]
        return "".join(event["choices"][0]["text"] for event in events)
    return str(reply.json()["choices"][0]["text"])


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_ten_times_the_load_is_answered_or_told_to_come_again(
    small: ServerProcess, stream: bool
) -> None:
    """Row 24. Who is admitted waits for those that were before, and for nobody else."""
    requests = [body(number, 60, stream=stream) for number in range(80)]
    alone = {}
    took = []
    for number in range(0, 80, 9):
        reply, seconds = post(small, requests[number])
        alone[number] = text(reply)
        took.append(seconds)
    with ThreadPoolExecutor(80) as pool:
        replies = list(pool.map(lambda one: post(small, one), requests))
    admitted = [seconds for reply, seconds in replies if reply.status_code == 200]
    refused = [reply for reply, _ in replies if reply.status_code != 200]
    assert len(admitted) >= 8
    assert refused, "it was more than fits"
    for reply in refused:
        assert "the queue is full" in check_error(reply, 429)["message"]
        assert int(reply.headers["retry-after"]) >= 1
    # Eight at most are before it, four at a time; the clients themselves take the cores, too.
    assert max(admitted) < 10 * max(took) + 5
    for number, expected in alone.items():
        reply, _ = replies[number]
        assert reply.status_code != 200 or text(reply) == expected
    wait_until(lambda: small.is_idle, "everything given back")
    assert text(post(small, requests[0])[0]) == alone[0], "and then it's taken again"


def test_what_never_fits_the_pool_is_refused_at_once(small: ServerProcess) -> None:
    """Row 25. What just fits is answered to the end."""
    (card,) = small.http.get("/v1/models").json()["data"]
    most = card["max_model_len"]
    assert most < 4096, "the pool holds less than the model's length"
    num_prompt = small.http.post("/tokenize", json={"prompt": body(1, 1)["prompt"]}).json()["count"]
    with undisturbed(small):
        for request in (body(1, most - num_prompt + 1), body(1, 1, prompt=[7] * most)):
            for stream in (False, True):
                error = check_error(post(small, {**request, "stream": stream})[0], 400)
                assert error["code"] == "context_length_exceeded"
    reply, _ = post(small, body(1, most - num_prompt))
    assert reply.json()["usage"]["total_tokens"] == most


def test_who_gives_up_blocks_says_the_same(small: ServerProcess) -> None:
    """Row 26: four answers that don't fit side by side, each as if it were alone."""
    most = small.http.get("/v1/models").json()["data"][0]["max_model_len"]
    requests = [body(n, most // 2, stream=n % 2 == 0, seed=n) for n in range(4)]
    requests[3] |= {"temperature": 0.8}
    alone = [text(post(small, request)[0]) for request in requests]
    assert len(set(alone)) == 4
    before = small.metric("mm_engine_num_preemptions_total")
    with ThreadPoolExecutor(4) as pool:
        together = [text(reply) for reply, _ in pool.map(lambda one: post(small, one), requests)]
    assert small.metric("mm_engine_num_preemptions_total") > before, "blocks ran out"
    assert together == alone
    wait_until(lambda: small.is_idle, "everything given back")
