"""`X-Request-Id`: the client's own if it is harmless, on every response and in the log."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from openai import BadRequestError, OpenAI

from pictures import data_url, encode, quarters
from serving import KEY, ServerProcess, wait_until

NEW = re.compile(r"[0-9a-f]{32}")
GOOD = {"prompt": "circle", "max_tokens": 2}


def header(response: httpx.Response) -> str:
    (value,) = response.headers.get_list("x-request-id")
    return str(value)


@pytest.mark.parametrize("given", ["a", "Order:17_b.c-d", "x" * 128])
def test_a_good_id_comes_back(server: ServerProcess, given: str) -> None:
    response = server.http.get("/version", headers={"X-Request-Id": given})
    assert header(response) == given


@pytest.mark.parametrize(
    "given",
    [b"", b"x" * 129, b"a b", b"a,b", b"a/b", b"<script>", b'a"b', "é".encode(), b"\xff", b"a\tb"],
)
def test_another_is_replaced_by_a_new_one(server: ServerProcess, given: bytes) -> None:
    responses = [server.http.get("/version", headers=[(b"X-Request-Id", given)]) for _ in range(2)]
    assert all(NEW.fullmatch(header(response)) for response in responses)
    assert header(responses[0]) != header(responses[1])


def test_two_of_them_are_none(server: ServerProcess) -> None:
    both = [("X-Request-Id", "first"), ("X-Request-Id", "second")]
    assert NEW.fullmatch(header(server.http.get("/version", headers=both)))


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "/health", None, 200),
        ("GET", "/metrics", None, 200),
        ("GET", "/no/such/route", None, 404),
        ("DELETE", "/v1/models", None, 405),
        ("POST", "/v1/completions", GOOD, 200),
        ("POST", "/v1/completions", {**GOOD, "stream": True}, 200),
        ("POST", "/v1/completions", {**GOOD, "n": 0}, 400),
        ("POST", "/v1/completions", {**GOOD, "model": "another"}, 404),
        ("POST", "/v1/chat/completions", {"messages": []}, 400),
    ],
)
def test_every_response_carries_it(
    server: ServerProcess, method: str, path: str, body: dict[str, Any] | None, status: int
) -> None:
    response = server.http.request(method, path, json=body, headers={"X-Request-Id": "mine"})
    assert response.status_code == status
    assert header(response) == "mine"


def test_refusals_before_the_routes_carry_it(strict: ServerProcess) -> None:
    with httpx.Client(base_url=strict.url, headers={"X-Request-Id": "mine"}) as client:
        assert header(client.get("/v1/models")) == "mine"  # 401
        client.headers["Authorization"] = f"Bearer {KEY}"
        large = client.post("/v1/completions", content=b" " * (32 * 2**20 + 1))
    assert (large.status_code, header(large)) == (413, "mine")


def test_the_openai_client_shows_it(client: OpenAI) -> None:
    ask: dict[str, Any] = {"model": "demo", "prompt": "circle", "max_tokens": 1}
    answer = client.completions.create(**ask, extra_headers={"X-Request-Id": "mine-17"})
    assert answer._request_id == "mine-17"
    new = client.completions.create(**ask)._request_id
    assert new is not None and NEW.fullmatch(new)
    with pytest.raises(BadRequestError) as raised:
        client.completions.create(**ask, n=1000, extra_headers={"X-Request-Id": "mine-18"})
    assert raised.value.request_id == "mine-18"


def test_lines_of_the_log_carry_it(strict: ServerProcess) -> None:
    picture = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(13, 16)))}}
    body = {"messages": [{"role": "user", "content": [picture]}], "max_tokens": 2}
    response = strict.http.post(
        "/v1/chat/completions", json=body, headers={"X-Request-Id": "mine-19"}
    )
    assert response.status_code == 500
    wait_until(lambda: "chat/completions 500" in strict.output, "its line in the log")
    lines = [line for line in strict.output.splitlines() if "mine-19" in line]
    error, access = lines
    assert " ERROR faulty.py " in error and error.endswith(" · request mine-19")
    assert " INFO POST /v1/chat/completions 500 · " in access
    assert access.endswith(" · request mine-19")


def test_ids_of_requests_at_the_same_time_stay_apart(server: ServerProcess) -> None:
    first = {"X-Request-Id": "slow-1"}
    body = {"prompt": "circle", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body, headers=first) as response:
        lines = response.iter_lines()
        next(lines)
        server.http.post("/v1/completions", json=GOOD, headers={"X-Request-Id": "quick-1"})
        list(lines)
    wait_until(lambda: "slow-1" in server.output, "the slow one's line")
    (slow,) = (line for line in server.output.splitlines() if "request slow-1" in line)
    (quick,) = (line for line in server.output.splitlines() if "request quick-1" in line)
    assert " 200 tokens " in slow and " 2 tokens " in quick
