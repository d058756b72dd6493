"""Whose turn it is, over HTTP: priorities, and a pace that is the server's default."""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serving import ServerProcess, wait_until


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that runs one sequence at a time."""
    folder = tmp_path_factory.mktemp("narrow")
    flags = ("--dtype", "float32", "--kv-cache-memory", "64MiB", "--max-num-seqs", "1")
    flags += ("--scheduling-policy", "priority")
    with ServerProcess(folder, *flags) as started:
        yield started


def complete(server: ServerProcess, route: str = "completions", **fields: Any) -> Any:
    prompt: dict[str, Any] = {"prompt": "a red"}
    if route == "chat/completions":
        prompt = {"messages": [{"role": "user", "content": "a red"}]}
    body = {**prompt, "temperature": 0, "ignore_eos": True, **fields}
    return server.http.post(f"/v1/{route}", json=body)


@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_request_of_a_better_priority_overtakes_one_that_runs(
    narrow: ServerProcess, route: str
) -> None:
    alone = complete(narrow, max_tokens=400).json()
    ended: list[str] = []

    def ask(name: str, **fields: Any) -> Any:
        reply = complete(narrow, **fields)
        ended.append(name)
        return reply

    before = narrow.metric("mm_engine_num_preemptions_total")
    with ThreadPoolExecutor(3) as pool:
        slow = pool.submit(ask, "slow", max_tokens=400, priority=5)
        wait_until(lambda: narrow.metric("mm_engine_num_requests_running") == 1, "it runs")
        # Long enough that the threads of the clients note the ends in their order.
        next_in_line = pool.submit(ask, "next in line", max_tokens=200, priority=5)
        wait_until(lambda: narrow.metric("mm_engine_num_requests_waiting") == 1, "it waits")
        urgent = pool.submit(ask, "urgent", route=route, max_tokens=2, priority=-5)
        replies = [future.result() for future in (slow, next_in_line, urgent)]
    assert [reply.status_code for reply in replies] == [200, 200, 200]
    assert ended == ["urgent", "slow", "next in line"]
    assert narrow.metric("mm_engine_num_preemptions_total") == before + 1
    assert replies[0].json()["choices"][0]["text"] == alone["choices"][0]["text"]


@pytest.mark.parametrize("priority", ["high", 1.5, 2**63, True])
@pytest.mark.parametrize("route", ["completions", "chat/completions"])
def test_a_priority_that_is_no_integer_is_refused(
    narrow: ServerProcess, route: str, priority: Any
) -> None:
    reply = complete(narrow, route=route, max_tokens=1, priority=priority)
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "priority"
    assert complete(narrow, route=route, max_tokens=1, priority=-(2**63)).status_code == 200


def test_the_log_says_how_much_of_prompts_a_step_takes(narrow: ServerProcess) -> None:
    found = re.search(r"Tokens of prompts in a step: up to (\d+) beside 1 decodes", narrow.output)
    assert found
    assert int(found[1]) >= 8
