"""Whose turn it is, over HTTP: priorities, and a pace that is the server's default."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serving import FLAGS, ServerProcess, sse_events, wait_until


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server that runs one sequence at a time."""
    folder = tmp_path_factory.mktemp("narrow")
    flags = (*FLAGS, "--max-num-seqs", "1", "--scheduling-policy", "priority")
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
    alone = complete(narrow, max_tokens=400).json()["choices"][0]["text"]
    before = narrow.metric("mm_engine_num_preemptions_total")
    generated = narrow.metric("mm_engine_generation_tokens_total")
    # The slow one is much longer than what it is read of: all this happens while it runs.
    slow = {"prompt": "a red", "temperature": 0, "ignore_eos": True, "stream": True}
    slow |= {"max_tokens": 3000, "priority": 5, "logprobs": 1}
    with (
        ThreadPoolExecutor(1) as pool,
        narrow.http.stream("POST", "/v1/completions", json=slow) as response,
    ):
        events = sse_events(response.iter_lines())
        text, tokens = "", []

        def read() -> None:
            nonlocal text
            choice = json.loads(next(events))["choices"][0]
            text += choice["text"]
            tokens.extend(choice["logprobs"]["tokens"])

        read()
        next_in_line = pool.submit(complete, narrow, max_tokens=2, priority=5)
        wait_until(lambda: narrow.metric("mm_engine_num_requests_waiting") == 1, "it waits")
        urgent = complete(narrow, route=route, max_tokens=2, priority=-5)
        assert urgent.status_code == 200
        assert narrow.metric("mm_engine_num_preemptions_total") == before + 1
        generated = narrow.metric("mm_engine_generation_tokens_total") - generated
        while len(tokens) <= generated or len(text) < len(alone):
            read()
        assert text.startswith(alone)
        assert not next_in_line.done(), "the slow one went on before it"
        assert narrow.metric("mm_engine_num_requests_waiting") == 1
    assert next_in_line.result().status_code == 200
    assert narrow.metric("mm_engine_num_preemptions_total") == before + 1


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
    assert re.search(r"Tokens of prompts in a step: up to \d+ beside 1 decodes", narrow.output)
