"""How a stream of a response ends that something cuts off, before and behind its first event."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai.types.responses import ResponseErrorEvent, ResponseFailedEvent

from mm_engine.errors import EngineDead, MMEngineError, RequestError
from mm_engine.outputs import CompletionOutput, RequestOutput
from mm_engine.server.errors import body_of
from mm_engine.server.exchange import event_lines
from mm_engine.server.protocol import parse
from mm_engine.server.response_api import ResponseReply
from mm_engine.server.response_protocol import ResponseRequest


def reply() -> ResponseReply:
    asked = parse(ResponseRequest, b'{"input": "x", "metadata": {"k": "v"}}')
    return ResponseReply("demo", asked, asked.sampling_params())


def last(lines: bytes) -> tuple[str, dict[str, Any]]:
    """Name and data of the one event."""
    name, data, *rest = lines.decode().split("\n")
    assert rest == ["", ""]
    return name.removeprefix("event: "), json.loads(data.removeprefix("data: "))


@pytest.mark.parametrize(
    ("error", "code"),
    [(EngineDead("gone. Come back."), "server_error"), (RequestError("no. Go."), "invalid_prompt")],
)
def test_a_response_that_was_told_of_fails(error: MMEngineError, code: str) -> None:
    told = reply()
    events = [last(event_lines(event)) for event in told.opening()]
    assert events[0][0] == events[0][1]["type"] == "response.created"
    output = RequestOutput("x", [CompletionOutput(0, "a", [5])])
    (delta,) = told.events(0, output)
    assert last(event_lines(delta))[0] == delta["type"] == "response.output_text.delta"
    name, data = last(told.ending(body_of(error)[1]))
    assert name == data["type"] == "response.failed"
    event = ResponseFailedEvent.model_validate(data)
    assert event.sequence_number == len(events) + 1
    assert event.response.id == told.id
    assert (event.response.status, event.response.metadata) == ("failed", {"k": "v"})
    assert event.response.error is not None
    assert (event.response.error.code, event.response.error.message) == (code, str(error))


def test_an_error_before_that_is_an_event_of_its_own() -> None:
    name, data = last(reply().ending(body_of(RequestError("no. Go.", param="input"))[1]))
    assert name == data["type"] == "error"
    event = ResponseErrorEvent.model_validate(data)
    assert (event.message, event.param, event.sequence_number) == ("no. Go.", "input", 0)


def test_a_whole_one_ends_with_nothing_more() -> None:
    assert reply().ending(None) == b""
