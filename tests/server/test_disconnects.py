"""A client that goes away: what its request held is given back."""

from __future__ import annotations

import json
import socket

from openai import OpenAI

from serving import ServerProcess, wait_until

LONG = {"prompt": "circle", "max_tokens": 3000, "ignore_eos": True}


def test_leaving_a_stream_aborts_it(server: ServerProcess) -> None:
    body = {**LONG, "stream": True}
    with server.http.stream("POST", "/v1/completions", json=body) as response:
        lines = response.iter_lines()  # kept: httpx closes the response along with its iterator
        next(lines)
        assert server.metric("mm_engine_num_requests_running") == 1
        assert server.metric("mm_engine_num_used_blocks") > 0
    wait_until(lambda: server.is_idle, "everything given back")


def test_leaving_while_waiting_for_a_whole_answer_aborts_it(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "n": 3}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        wait_until(lambda: server.metric("mm_engine_num_requests_running") == 3, "three to run")
    wait_until(lambda: server.is_idle, "everything given back")
    wait_until(lambda: "POST /v1/completions 499" in server.output, "its line in the log")


def test_leaving_in_the_middle_of_a_body_is_no_error(server: ServerProcess) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{"
        )
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
