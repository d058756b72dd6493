"""Whether clients may preempt each other is the operator's word: first come, first served if not.

What priorities do where they are offered is in test_fairness.py.
"""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from serving import ServerProcess

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": ["circle", "square"]},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "circle"}]},
}
routes = pytest.mark.parametrize("route", BODIES)


def ask(server: ServerProcess, route: str, **fields: Any) -> httpx.Response:
    return server.http.post(route, json={**BODIES[route], "max_tokens": 1, **fields})


@routes
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("priority", [-(2**63), -1, 1, 2**63 - 1])
def test_a_priority_is_refused_unless_the_server_offers_it(
    server: ServerProcess, route: str, priority: int, stream: bool
) -> None:
    reply = ask(server, route, priority=priority, stream=stream)
    assert reply.status_code == 400
    assert reply.json()["error"] == {
        "message": "priority isn't offered by this server. Leave it out, or start the server with "
        "--scheduling-policy priority.",
        "type": "invalid_request_error",
        "param": "priority",
        "code": None,
    }


@routes
@pytest.mark.parametrize("priority", [0, None])
def test_a_priority_that_asks_for_nothing_is_taken(
    server: ServerProcess, route: str, priority: int | None
) -> None:
    assert ask(server, route, priority=priority).status_code == 200


@routes
def test_a_priority_is_refused_before_the_prompt_is_looked_at(
    server: ServerProcess, route: str
) -> None:
    """An image costs a thread's time, a prompt a hook's: the refused pay nothing to the others."""
    prompt: dict[str, Any] = {"prompt": "circle " * 5000}
    if route == "/v1/chat/completions":
        image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
        prompt = {"messages": [{"role": "user", "content": [image]}]}
    params = [
        ask(server, route, **prompt, **fields).json()["error"]["param"]
        for fields in ({"priority": 1}, {})
    ]
    assert params[0] == "priority"
    assert params[1] not in (None, "priority"), "the prompt alone would be refused, too"
