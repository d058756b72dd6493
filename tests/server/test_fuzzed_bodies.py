"""Bytes of good bodies, changed at random, over one socket after another. Rows 12, 15 and 17."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from bystanders import UNSPEAKABLE, check_error, undisturbed
from pictures import data_url, encode, quarters
from serving import FLAGS, ServerProcess

NUM_BODIES = 60  # for each route
MAX_SECONDS = 40.0  # for each route; it's a bound, not what it takes
PICTURE = data_url(encode(quarters(16, 16)))
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SAMPLED: dict[str, Any] = {
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 5,
    "seed": 3,
    "stop": ["x", "yz"],
    "n": 1,
    "logit_bias": {"7": 1.5},
    "presence_penalty": 0.1,
    "cache_salt": "s",
    "model": "demo",
}
GOOD: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "what é 🙂?"},
                    {"type": "image_url", "image_url": {"url": PICTURE, "detail": "low"}},
                ],
            },
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "tool_call_id": "c", "content": "[1, 2]"},
        ],
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
        **SAMPLED,
    },
    "/v1/completions": {"prompt": ["a red", "circle é"], "max_tokens": 3, "logprobs": 1, **SAMPLED},
    "/v1/responses": {
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "what?"},
                    {"type": "input_image", "image_url": PICTURE},
                ],
            }
        ],
        "instructions": "Be brief.",
        "metadata": {"a": "b"},
        "max_output_tokens": 3,
        **SAMPLED,
    },
    "/tokenize": {"prompt": "a red circle é 🙂", "add_special_tokens": True, "model": "demo"},
    "/detokenize": {"tokens": [1, 2, 3, 400, 5], "model": "demo"},
}
#: What is put into a body in place of something, or beside it.
PIECES = (
    *(b"null", b"true", b"{}", b"[]", b'""', b"-1", b"0", b"1e999", b"NaN", b"9" * 40, b"1.5"),
    *(b'"', b"\\", b"{", b"}", b"[", b"]", b",", b":", b"\x00", b"\xff", b"\xed\xa0\x80"),
    *(b'"\\ud800"', b'"\\u0000"', b'"<image>"', b"[" * 300, b'"x": 1,', b"\r\n", b"//"),
)


def mutated(good: bytes, draw: random.Random) -> bytes:
    """A few changes of bytes, of values, or of the order of things."""
    body = bytearray(good)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(body) + 1)
        end = min(len(body), at + draw.choice((0, 1, 1, 4, 30)))
        match draw.randrange(6):
            case 0:
                body[at:end] = draw.randbytes(end - at)
            case 1:
                body[at:end] = draw.choice(PIECES)
            case 2:
                del body[at:end]
            case 3:
                body[at:at] = body[at:end] * draw.choice((1, 2, 50))
            case 4:
                del body[at:]
            case _:  # a value, whole: what is behind a colon up to the next comma
                start = body.find(b":", at) + 1
                stop = body.find(b",", start)
                if 0 < start < stop:
                    body[start:stop] = draw.choice(PIECES)
    return bytes(body)


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose answers end soon, even if a change has taken their limit."""
    folder = tmp_path_factory.mktemp("short")
    with ServerProcess(folder, *FLAGS, "--max-model-len", "512") as started:
        yield started


@pytest.mark.parametrize("route", GOOD)
def test_mutated_bodies_are_answered_or_refused(short: ServerProcess, route: str) -> None:
    """With statuses of the document, and errors in their shape; nothing else changes."""
    good = json.dumps(GOOD[route], ensure_ascii=False).encode()
    draw = random.Random(route)  # the same bodies each time
    operation = short.http.get("/openapi.json").json()["paths"][route]["post"]
    documented = {int(status) for status in operation["responses"]} - {500, 503}
    assert short.http.post(route, content=good).status_code == 200
    statuses: list[int] = []
    start = time.monotonic()
    with undisturbed(short, new_rows=True):
        while len(statuses) < NUM_BODIES and time.monotonic() - start < MAX_SECONDS:
            body = mutated(good, draw)
            with httpx.Client(base_url=short.url, timeout=30) as client:
                reply = client.post(route, content=body)
            statuses.append(reply.status_code)
            assert reply.status_code in documented, (reply.status_code, body)
            if reply.status_code != 200:
                check_error(reply, reply.status_code)
            elif reply.headers["content-type"] == "application/json":
                reply.json()
            assert not [part for part in UNSPEAKABLE[:4] if part in reply.text], body
    assert len(statuses) > 10  # of a machine that is busy with other things
    assert {200, 400} <= set(statuses), "some are good still"
    assert short.http.post(route, content=good).status_code == 200


def test_changes_are_many_and_the_same_each_time() -> None:
    good = json.dumps(GOOD["/v1/completions"]).encode()
    made = [[mutated(good, random.Random(seed)) for seed in range(300)] for _ in range(2)]
    assert made[0] == made[1]
    assert len(set(made[0])) > 250
    assert made[0].count(good) < 30  # a few changes are none
