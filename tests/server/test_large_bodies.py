"""Bodies made to take long: /health answers all the while, and memory stays. Rows 14 and 29."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from bystanders import check_error, undisturbed
from mm_engine.server.protocol import MAX_VALUES, ChatRequest, CompletionRequest, parse
from mm_engine.server.response_protocol import ResponseRequest
from mm_engine.server.tokenize import DetokenizeRequest, TokenizeRequest
from pictures import data_url, encode, quarters
from serving import FLAGS, ServerProcess, wait_until

pytestmark = pytest.mark.long

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
#: Seconds, of 99 in 100 answers. That it freezes is what is looked for here; the 200 ms that it may
#: take are measured by benchmarks/open.py, on a machine that does nothing else.
MAX_HEALTH = 3.0
WORDS = "a red circle "


@contextmanager
def watched(server: ServerProcess, num_least: int = 1) -> Iterator[dict[str, float]]:
    """How long /health takes meanwhile, and by how much memory grows; told on leaving."""
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    told: dict[str, float] = {}
    seconds: list[float] = []
    sizes: list[int] = [before]
    over = threading.Event()

    def poll() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not over.is_set() or len(seconds) < num_least:
                start = time.perf_counter()
                assert client.get("/health").status_code == 200
                seconds.append(time.perf_counter() - start)
                sizes.append(process.memory_info().rss)
                time.sleep(0.005)

    thread = threading.Thread(target=poll)
    thread.start()
    try:
        yield told
    finally:
        over.set()
        thread.join()
    seconds.sort()
    told["p99"] = seconds[int(len(seconds) * 0.99)]
    told["median"] = seconds[len(seconds) // 2]
    told["growth"] = max(sizes) - before


def many(what: bytes, num: int = 10 * 2**20) -> bytes:
    return b"[" + b",".join([what] * num) + b"]"


#: Each in a few words of JSON; what took minutes and gigabytes before there was a limit.
LARGE: dict[str, tuple[str, Callable[[], bytes]]] = {
    "ids": (COMPLETIONS, lambda: b'{"prompt": %s}' % many(b"1")),
    "lists": (COMPLETIONS, lambda: b'{"prompt": %s}' % many(b"[]")),
    "nested": (COMPLETIONS, lambda: b'{"prompt": %s}' % many(b"[" * 90 + b"]" * 90, 170_000)),
    "stops": (COMPLETIONS, lambda: b'{"prompt": "x", "stop": %s}' % many(b"1")),
    "messages": (CHAT, lambda: b'{"messages": %s}' % many(b"{}")),
    "items": ("/v1/responses", lambda: b'{"input": %s}' % many(b"{}")),
    "unknown": (CHAT, lambda: b'{"messages": [], "x": %s}' % many(b"0")),
    "tokens": ("/detokenize", lambda: b'{"tokens": %s}' % many(b"1")),
}


@pytest.mark.parametrize("case", LARGE)
def test_more_values_than_are_read_are_refused_unread(server: ServerProcess, case: str) -> None:
    route, make = LARGE[case]
    body = make()
    assert 2**23 < len(body) < 32 * 2**20
    with undisturbed(server), watched(server) as told:
        start = time.monotonic()
        error = check_error(server.http.post(route, content=body), 400)
        assert time.monotonic() - start < 60
    assert "too many values" in error["message"]
    assert told["p99"] < MAX_HEALTH
    assert told["growth"] < 200 * 2**20  # the body itself, a few times


#: As many bad entries as are read. The route, the body around them, the field that is named.
BAD: dict[str, tuple[str, str, Any, str]] = {
    "stops": (COMPLETIONS, '{"prompt": "x", "stop": %s}', 1, "stop.0"),
    "stop ids": (COMPLETIONS, '{"prompt": "x", "stop_token_ids": %s}', "1", "stop_token_ids.0"),
    "choices": (COMPLETIONS, '{"prompt": "x", "guided_choice": %s}', 1, "guided_choice.0"),
    "prompts": (COMPLETIONS, '{"prompt": %s}', 1.5, "prompt"),
    "messages": (CHAT, '{"messages": %s}', 1, "messages.0"),
    "tools": (CHAT, '{"messages": [{"role": "user", "content": "x"}], "tools": %s}', 1, "tools.0"),
    "parts": (CHAT, '{"messages": [{"role": "user", "content": %s}]}', 1, "messages.0.content.0"),
    "items": ("/v1/responses", '{"input": %s}', 1, "input.0"),
    "include": ("/v1/responses", '{"input": "x", "include": %s}', 1, "include.0"),
    "tokens": ("/detokenize", '{"tokens": %s}', -1, "tokens.0"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_list_is_refused_at_its_first_bad_entry(server: ServerProcess, case: str) -> None:
    route, around, entry, param = BAD[case]
    body = around % json.dumps([entry] * 500_000)
    with watched(server) as told:
        start = time.monotonic()
        check_error(server.http.post(route, content=body), 400, param)
        assert time.monotonic() - start < 60
    assert told["p99"] < MAX_HEALTH
    assert told["growth"] < 100 * 2**20


@pytest.mark.parametrize(
    "shape", [ChatRequest, CompletionRequest, ResponseRequest, TokenizeRequest, DetokenizeRequest]
)
def test_every_list_of_a_body_is_such_a_list(shape: Any) -> None:
    """So that a new field is, too."""
    found = []

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            if schema.get("type") == "list":
                found.append(bool(schema.get("fail_fast")))
            for value in schema.values():
                walk(value)
        elif isinstance(schema, list | tuple):
            for value in schema:
                walk(value)

    walk(shape.__pydantic_core_schema__)
    assert found and all(found)


@pytest.mark.parametrize(
    ("shape", "field", "body"),
    [
        (CompletionRequest, "logit_bias", '{"prompt": "x", "logit_bias": %s}'),
        (ResponseRequest, "metadata", '{"input": "x", "metadata": %s}'),
    ],
)
def test_an_object_of_too_many_entries_is_refused_by_their_number(
    shape: Any, field: str, body: str
) -> None:
    entries = json.dumps({f"bad {i}": None for i in range(100_000)})
    with pytest.raises(Exception, match=f"{field}: too many entries"):
        parse(shape, (body % entries).encode())


def test_as_many_values_as_are_read_are_taken(server: ServerProcess) -> None:
    """The positive control of the limit."""
    body = b'{"tokens": [1], "x": %s}' % many(b"0", MAX_VALUES - 5)
    assert server.http.post("/detokenize", content=body).status_code == 200
    body = b'{"tokens": [1], "x": %s}' % many(b"0", MAX_VALUES)
    check_error(server.http.post("/detokenize", content=body), 400)


TEXTS: dict[str, Callable[[str], tuple[str, dict[str, Any], str]]] = {
    "completion": lambda text: (COMPLETIONS, {"prompt": text}, "prompt"),
    "chat": lambda text: (CHAT, {"messages": [{"role": "user", "content": text}]}, "messages"),
    "parts": lambda text: (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text}] * 2}]},
        "messages",
    ),
    "response": lambda text: ("/v1/responses", {"input": text}, "input"),
    "tokens": lambda text: ("/tokenize", {"prompt": text}, "prompt"),
}


@pytest.mark.parametrize("case", TEXTS)
def test_a_text_that_no_prompt_holds_isnt_tokenized(server: ServerProcess, case: str) -> None:
    route, body, param = TEXTS[case](WORDS * (14 * 2**20 // len(WORDS)))
    with undisturbed(server), watched(server) as told:
        start = time.monotonic()
        error = check_error(server.http.post(route, json=body), 400, param)
        assert time.monotonic() - start < 60
    assert "the text is too long" in error["message"]
    assert case == "tokens" or error["code"] == "context_length_exceeded"
    assert told["p99"] < MAX_HEALTH
    assert told["growth"] < 250 * 2**20


@pytest.mark.parametrize("case", TEXTS)
def test_health_answers_while_the_longest_text_is_tokenized(
    server: ServerProcess, case: str
) -> None:
    num_bytes = 2**20 // (2 if case == "parts" else 1)
    route, body, _ = TEXTS[case](WORDS * (num_bytes // len(WORDS)))
    with watched(server, num_least=100) as told:
        for _ in range(3):
            reply = server.http.post(route, json=body)
            if case == "tokens":
                assert reply.json()["count"] > 4096
            else:
                error = check_error(reply, 400)
                assert "tokens, images included" in error["message"], "it was tokenized"
    assert told["p99"] < MAX_HEALTH, told
    assert told["median"] < MAX_HEALTH / 4, told


def test_health_answers_while_the_engine_is_busy(tmp_path: Path) -> None:
    """Long prompts are read, images are encoded and answers written, all at once."""
    with ServerProcess(tmp_path, *FLAGS, "--max-num-batched-tokens", "2048") as server:
        sizes = iter(range(40, 10_000))

        def picture() -> dict[str, Any]:  # another each time: none is found in a cache
            url = data_url(encode(quarters(next(sizes) * 4, 333)))
            return {"type": "image_url", "image_url": {"url": url}}

        def bodies() -> Iterator[tuple[str, dict[str, Any]]]:
            for number in range(6):
                yield COMPLETIONS, {"prompt": f"{number} " + WORDS * 700, "max_tokens": 50}
                content = [picture() for _ in range(8)]
                yield CHAT, {"messages": [{"role": "user", "content": content}], "max_tokens": 50}

        asked = list(bodies())
        replies: list[int] = []

        def ask(route: str, body: dict[str, Any]) -> None:
            with httpx.Client(base_url=server.url, timeout=120) as client:
                replies.append(client.post(route, json=body).status_code)

        threads = [threading.Thread(target=ask, args=one) for one in asked]
        with watched(server, num_least=100) as told:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert replies == [200] * len(asked)
        assert server.metric("mm_engine_encodes_total") >= 48
        assert told["p99"] < MAX_HEALTH, told
        wait_until(lambda: server.is_idle, "everything given back")
