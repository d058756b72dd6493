"""Limits of what is taken in: the size of a body, the key, the length of the queue."""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import httpx
import pytest
from openai import AuthenticationError, OpenAI, RateLimitError

from mm_engine.server.app import ROUTES
from mm_engine.server.keys import OPEN_PATHS
from pictures import data_url, encode, quarters
from serving import KEY, ServerProcess, wait_until

COMPLETIONS = "/v1/completions"
MAX_BODY = 32 * 2**20


def padded(num_bytes: int) -> bytes:
    """A good body of exactly this length."""
    body = b'{"prompt": "circle", "max_tokens": 1}'
    return body + b" " * (num_bytes - len(body))


def chunked(body: bytes) -> Iterator[bytes]:
    for start in range(0, len(body), 2**20):
        yield body[start : start + 2**20]


@pytest.mark.parametrize("chunks", [False, True], ids=["with length", "chunked"])
def test_a_body_up_to_the_limit_is_taken_and_one_over_it_is_413(
    server: ServerProcess, chunks: bool
) -> None:
    for num_bytes, status in ((MAX_BODY, 200), (MAX_BODY + 1, 413)):
        body = padded(num_bytes)
        response = server.http.post(COMPLETIONS, content=chunked(body) if chunks else body)
        assert response.status_code == status
    assert response.json()["error"]["message"].startswith("the body is over 33554432 bytes")


def test_an_endless_body_is_cut_off(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        piece = b"100000\r\n" + b" " * 2**20 + b"\r\n"
        endless = iter(lambda: connection.sendall(piece), "never")
        with pytest.raises((BrokenPipeError, ConnectionResetError)):
            deque(islice(endless, 1000))
    assert server.http.get("/health").status_code == 200


def test_an_announced_giant_is_refused_without_waiting_for_it(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n"
            b"Content-Length: 99999999999999999999\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_header_without_end_is_refused(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: ")
        answer = b""
        try:
            for _ in range(200):
                connection.sendall(b"x" * 4096)
            answer = connection.recv(100)
        except (BrokenPipeError, ConnectionResetError):
            return  # it was cut off, which is as good
        assert answer.startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "OPTIONS"])
@pytest.mark.parametrize("path", [*sorted(ROUTES - OPEN_PATHS), "/", "/v1/models/first", "/no"])
def test_every_route_and_method_wants_the_key(
    strict: ServerProcess, method: str, path: str
) -> None:
    with httpx.Client(base_url=strict.url) as stranger:
        response = stranger.request(method, path)
    assert response.status_code == 401
    assert response.headers["www-authenticate"] == "Bearer"
    assert response.json()["error"]["code"] == "invalid_api_key"
    assert strict.http.request(method, path).status_code != 401


@pytest.mark.parametrize("path", sorted(OPEN_PATHS))
def test_probes_want_no_key(strict: ServerProcess, path: str) -> None:
    with httpx.Client(base_url=strict.url) as stranger:
        assert stranger.get(path).status_code == 200
        assert stranger.get(f"{path}/").status_code == 401
        assert stranger.get(f"/{path}").status_code == 401


@pytest.mark.parametrize(
    "header",
    ["", "Bearer", "Bearer ", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}", KEY],
)
def test_a_wrong_key_is_refused(strict: ServerProcess, header: str) -> None:
    with httpx.Client(base_url=strict.url) as stranger:
        response = stranger.get("/v1/models", headers={"Authorization": header.strip()})
    assert response.status_code == 401


def test_the_client_sends_the_key_in_the_way_that_is_expected(strict: ServerProcess) -> None:
    with strict.client(KEY) as client:
        assert [model.id for model in client.models.list()] == ["first", "second"]
        assert client.models.retrieve("second").id == "second"
    with strict.client("wrong") as client, pytest.raises(AuthenticationError):
        client.models.list()


def test_the_key_is_never_printed(strict: ServerProcess) -> None:
    strict.http.get("/v1/models")
    assert "GET /v1/models 200" in strict.output
    assert KEY not in strict.output


def test_the_limit_of_images_is_the_flags(strict: ServerProcess) -> None:
    part = {"type": "image_url", "image_url": {"url": data_url(encode(quarters()))}}
    for num_images, status in ((1, 200), (2, 400)):
        messages = [{"role": "user", "content": [part] * num_images}]
        body = {"messages": messages, "max_tokens": 1}
        assert strict.http.post("/v1/chat/completions", json=body).status_code == status


def long(client: OpenAI, **fields: Any) -> Any:
    return client.completions.create(
        model="first", prompt="circle", stream=True, max_tokens=3000, timeout=60,
        extra_body={"ignore_eos": True}, **fields,
    )  # fmt: skip


def test_a_full_queue_answers_429_and_takes_requests_again_later(strict: ServerProcess) -> None:
    with strict.client(KEY) as client:
        running = long(client)
        next(iter(running))
        with ThreadPoolExecutor() as pool:
            waiting = pool.submit(lambda: client.completions.create(model="first", prompt="x"))
            wait_until(
                lambda: strict.metric("mm_engine_num_requests_in_flight") == 2, "two in flight"
            )
            with pytest.raises(RateLimitError) as raised:
                client.completions.create(model="first", prompt="x")
            assert not waiting.done(), "nobody was waited for"
            assert int(raised.value.response.headers["retry-after"]) >= 1
            assert strict.http.get("/health").status_code == 200
            running.close()
            assert waiting.result().choices
        assert client.completions.create(model="first", prompt="x").choices


def test_each_prompt_of_a_list_counts(strict: ServerProcess) -> None:
    wait_until(lambda: strict.is_idle, "the last test's prompts to leave")
    with strict.client(KEY) as client:
        both = client.completions.create(model="first", prompt=["a", "b"], max_tokens=1)
        assert len(both.choices) == 2
        wait_until(lambda: strict.is_idle, "their places given back")
        alone = client.completions.create(model="first", prompt=["a", "b", "c"], max_tokens=1)
        assert len(alone.choices) == 3, "more than there are places for, where nobody else is"
        wait_until(lambda: strict.is_idle, "their places given back")
        running = long(client)
        next(iter(running))
        with pytest.raises(RateLimitError):
            client.completions.create(model="first", prompt=["a", "b"], max_tokens=1)
        running.close()
