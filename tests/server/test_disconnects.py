"""A client that goes away: what its request held is given back."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from openai import OpenAI

from serving import ServerProcess, wait_until

LONG: dict[str, Any] = {"prompt": "circle", "max_tokens": 3000, "ignore_eos": True}
LONG_RESPONSE = {"input": "circle", "max_output_tokens": 3000, "ignore_eos": True}
ROUTES = {"/v1/completions": LONG, "/v1/responses": LONG_RESPONSE}


@pytest.mark.parametrize("route", ROUTES)
def test_leaving_a_stream_aborts_it(server: ServerProcess, route: str) -> None:
    body = {**ROUTES[route], "stream": True}
    with server.http.stream("POST", route, json=body) as response:
        lines = response.iter_lines()  # kept: httpx closes the response along with its iterator
        next(lines)
        assert server.metric("mm_engine_num_requests_running") == 1
        assert server.metric("mm_engine_num_used_blocks") > 0
    wait_until(lambda: server.is_idle, "everything given back")


@pytest.mark.parametrize(
    ("route", "body", "num_running"),
    [("/v1/completions", {**LONG, "n": 3}, 3), ("/v1/responses", LONG_RESPONSE, 1)],
)
def test_leaving_while_waiting_for_a_whole_answer_aborts_it(
    server: ServerProcess, route: str, body: dict[str, Any], num_running: int
) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
        connection.sendall(head.encode() + content)
        wait_until(
            lambda: server.metric("mm_engine_num_requests_running") == num_running, "it to run"
        )
    wait_until(lambda: server.is_idle, "everything given back")
    wait_until(lambda: f"POST {route} 499" in server.output, "its line in the log")


@pytest.mark.parametrize("route", [*ROUTES, "/tokenize", "/detokenize"])
def test_leaving_in_the_middle_of_a_body_is_no_error(server: ServerProcess, route: str) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{"
        connection.sendall(head.encode())
        wait_until(lambda: server.metric("mm_engine_num_requests_in_flight") == 1, "it to be read")
    wait_until(lambda: server.is_idle, "everything given back")
    assert "internal error" not in server.output


def test_neighbours_of_a_client_that_leaves_are_answered(
    server: ServerProcess, client: OpenAI
) -> None:
    ask = {"model": "demo", "prompt": "circle", "max_tokens": 100, "temperature": 0}
    request = {**ask, "extra_body": {"ignore_eos": True}}
    alone = client.completions.create(**request).choices[0].text
    stream = client.completions.create(**request, stream=True)
    text = next(iter(stream)).choices[0].text
    for _ in range(5):
        body = {**LONG, "stream": True}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
    text += "".join(chunk.choices[0].text for chunk in stream)
    assert text == alone
    wait_until(lambda: server.is_idle, "everything given back")
