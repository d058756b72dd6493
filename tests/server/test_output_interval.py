"""Tokens that come sooner than `--output-interval` share an event; nothing else changes."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serving import FLAGS, ServerProcess, sse_events

INTERVAL = 0.2
ASKED: dict[str, Any] = {"prompt": "circle", "max_tokens": 300, "temperature": 0}


@pytest.fixture(scope="module")
def seldom(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    flags = (*FLAGS, "--output-interval", str(INTERVAL))
    with ServerProcess(tmp_path_factory.mktemp("seldom"), *flags) as started:
        yield started


@pytest.mark.parametrize(
    "more",
    [{"ignore_eos": True}, {"ignore_eos": True, "n": 2}, {"stop": ["e"], "logprobs": 1}],
    ids=["long", "two", "stopped"],
)
def test_a_stream_has_an_event_in_an_interval_and_all_of_the_answer(
    seldom: ServerProcess, more: dict[str, Any]
) -> None:
    asked = ASKED | more
    whole = {
        c["index"]: c for c in seldom.http.post("/v1/completions", json=asked).json()["choices"]
    }
    texts, reasons, num_events = dict.fromkeys(whole, ""), {}, dict.fromkeys(whole, 0)
    logprobs: list[float] = []
    begin = time.monotonic()
    with seldom.http.stream("POST", "/v1/completions", json=asked | {"stream": True}) as answer:
        for event in sse_events(answer.iter_lines()):
            if event == "[DONE]":
                break
            (choice,) = json.loads(event)["choices"]
            texts[choice["index"]] += choice["text"]
            reasons[choice["index"]] = choice["finish_reason"]
            num_events[choice["index"]] += 1
            logprobs += (choice["logprobs"] or {}).get("token_logprobs", [])
    seconds = time.monotonic() - begin
    assert texts == {index: choice["text"] for index, choice in whole.items()}
    assert reasons == {index: choice["finish_reason"] for index, choice in whole.items()}
    assert logprobs == (whole[0]["logprobs"] or {}).get("token_logprobs", [])
    # Its first and its last come at once, and an interval that had begun before may end.
    assert all(2 <= num <= 3 + seconds / INTERVAL for num in num_events.values()), num_events
    if more.get("ignore_eos"):
        assert max(num_events.values()) < 300, "far fewer than tokens"


def test_the_first_token_waits_for_nobody(seldom: ServerProcess) -> None:
    """While another stream is told of once in an interval."""
    other = ASKED | {"max_tokens": 2000, "ignore_eos": True, "stream": True}
    with seldom.http.stream("POST", "/v1/completions", json=other) as answer:
        lines = answer.iter_lines()
        next(lines)
        for _ in range(5):
            with seldom.http.stream(
                "POST", "/v1/completions", json=ASKED | {"stream": True, "ignore_eos": True}
            ) as newcomer:
                events = sse_events(newcomer.iter_lines())
                assert len(json.loads(next(events))["choices"][0]["text"]) < 10, "its first alone"
        lines.close()
