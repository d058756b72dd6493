"""A client that goes away: what its request held is given back."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from bystanders import MAX_BLOCKS, SECOND, leaving, undisturbed, wait_until_held
from serving import ServerProcess, wait_until

#: Each route that answers, and a body for a long answer; the first has three at once.
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "circle", "max_tokens": 4000, "n": 3},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "circle"}],
        "max_tokens": 4000,
    },
    "/v1/responses": {"input": "circle", "max_output_tokens": 4000},
}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("route", ROUTES)
def test_leaving_an_answer_aborts_it(server: ServerProcess, route: str, stream: bool) -> None:
    """Row 27: while it comes, or is waited for."""
    body = {**ROUTES[route], "ignore_eos": True, "stream": stream}
    come = b""
    with undisturbed(server), leaving(server, route, body, within=SECOND) as connection:
        while stream and b"\ndata: " not in come:
            piece = connection.recv(2**16)
            assert piece, come
            come += piece
        # So many that what is left of them shows beside the neighbour's.
        wait_until_held(server, num_used_blocks=2 * MAX_BLOCKS + 1)


@pytest.mark.parametrize("route", [*ROUTES, "/tokenize", "/detokenize"])
def test_leaving_in_the_middle_of_a_body_is_no_error(server: ServerProcess, route: str) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:
        head = f"POST {route} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{"
        connection.sendall(head.encode())
        wait_until(lambda: server.metric("mm_engine_num_requests_in_flight") == 1, "it to be read")
    wait_until(lambda: server.is_idle, "everything given back")
    assert "internal error" not in server.output
