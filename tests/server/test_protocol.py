"""Whatever a body holds, it is a request or a `RequestError` whose body can be sent."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.types import Message

from mm_engine.errors import RequestError
from mm_engine.sampling_params import SamplingParams
from mm_engine.server.errors import error_response
from mm_engine.server.exchange import read_body
from mm_engine.server.protocol import ChatRequest, CompletionRequest, GenerationRequest, parse
from mm_engine.server.response_protocol import LOGPROBS, ResponseRequest
from mm_engine.server.tokenize import DetokenizeRequest, TokenizeRequest

GOOD: dict[type[GenerationRequest], dict[str, Any]] = {
    ChatRequest: {"messages": [{"role": "user", "content": "x"}]},
    CompletionRequest: {"prompt": "x"},
    ResponseRequest: {"input": "x"},
}
FIELDS = {shape: sorted({*shape.model_fields, *shape.not_offered} | {"unknown"}) for shape in GOOD}
SHAPES = pytest.mark.parametrize("shape", GOOD, ids=lambda shape: shape.__name__)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**60)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        [
            "user",
            "text",
            "input_text",
            "image_url",
            "input_image",
            "data:image/png;base64,",
            "\ud800",
        ]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["role", "content", "type", "text", "format", "image_url", "url", "1", "\ud800"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


def read(shape: type[GenerationRequest], body: bytes) -> SamplingParams | None:
    """As the endpoints do; None for a refusal, whose response must be made without a fault."""
    try:
        asked = parse(shape, body)
        if isinstance(asked, CompletionRequest):
            assert all(asked.prompts())
        if isinstance(asked, ResponseRequest):
            assert asked.chat().messages
        assert isinstance(asked, ChatRequest | CompletionRequest | ResponseRequest)
        return asked.sampling_params()
    except RequestError as error:
        refusal = error
    assert len(error_response(refusal).body) < 2000
    return None


@SHAPES
def test_the_good_body_is_read(shape: type[GenerationRequest]) -> None:
    assert read(shape, json.dumps(GOOD[shape]).encode()) is not None


@SHAPES
@settings(max_examples=300)
@given(data=st.data())
def test_any_value_in_any_field_is_taken_or_refused(
    shape: type[GenerationRequest], data: st.DataObject
) -> None:
    changes = data.draw(st.dictionaries(st.sampled_from(FIELDS[shape]), values, max_size=3))
    params = read(shape, json.dumps({**GOOD[shape], **changes}).encode())
    if params is not None:
        assert isinstance(params.n, int)


@SHAPES
@settings(max_examples=200)
@given(body=st.binary(max_size=60) | values.map(lambda value: json.dumps(value).encode()))
def test_any_body_is_taken_or_refused(shape: type[GenerationRequest], body: bytes) -> None:
    read(shape, body)


@pytest.mark.parametrize("shape", [TokenizeRequest, DetokenizeRequest])
@settings(max_examples=200)
@given(data=st.data())
def test_any_value_is_tokenized_or_refused(
    shape: type[TokenizeRequest | DetokenizeRequest], data: st.DataObject
) -> None:
    names = sorted({*shape.model_fields, *shape.not_offered})
    body = data.draw(st.dictionaries(st.sampled_from(names), values, max_size=3))
    try:
        asked = parse(shape, json.dumps(body).encode())
        if isinstance(asked, TokenizeRequest):
            asked.check(2**20)
            assert (asked.prompt is None) != (asked.messages is None)
    except RequestError as error:
        refusal = error_response(error)
    else:
        return
    assert len(refusal.body) < 2000


@SHAPES
@pytest.mark.parametrize(
    ("field", "value"),
    [("tools", []), ("tool_choice", "none"), ("response_format", {"type": "text"}), ("n", None)],
)
def test_a_field_that_asks_for_nothing_is_taken(
    shape: type[GenerationRequest], field: str, value: Any
) -> None:
    assert read(shape, json.dumps({**GOOD[shape], field: value}).encode()) is not None


def test_defaults_are_vllms() -> None:
    chat = read(ChatRequest, json.dumps(GOOD[ChatRequest]).encode())
    completion = read(CompletionRequest, json.dumps(GOOD[CompletionRequest]).encode())
    assert chat == SamplingParams(max_tokens=None)
    assert completion == SamplingParams(max_tokens=16)
    response = read(ResponseRequest, json.dumps(GOOD[ResponseRequest]).encode())
    assert response == SamplingParams(max_tokens=None)


def test_every_sampling_field_arrives() -> None:
    fields: dict[str, Any] = {
        "n": 2,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "seed": 3,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"7": -1.5},
        "max_tokens": 9,
        "min_tokens": 1,
        "stop": "x",
        "stop_token_ids": [4],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "skip_special_tokens": False,
    }
    expected = SamplingParams(**{**fields, "logit_bias": {7: -1.5}, "logprobs": 2})
    completion = {**GOOD[CompletionRequest], **fields, "logprobs": 2}
    chat = {**GOOD[ChatRequest], **fields, "logprobs": True, "top_logprobs": 2}
    assert read(CompletionRequest, json.dumps(completion).encode()) == expected
    assert read(ChatRequest, json.dumps(chat).encode()) == expected
    own: dict[str, Any] = {**GOOD[ResponseRequest], **fields, "max_output_tokens": 9}
    own |= {"n": 1, "max_tokens": None, "top_logprobs": 2, "include": [LOGPROBS]}
    one = dataclasses.replace(expected, n=1)
    assert read(ResponseRequest, json.dumps(own).encode()) == one


def test_a_body_that_never_ends_in_time_is_408() -> None:
    async def receive() -> Message:
        await asyncio.sleep(0.05)
        return {"type": "http.request", "body": b"x", "more_body": True}

    with pytest.raises(RequestError, match="took longer than 0.2 s") as raised:
        asyncio.run(read_body(receive, 0.2))
    assert raised.value.status == 408


def test_a_body_that_comes_in_pieces_is_put_together() -> None:
    pieces = iter([b"a", b"b", b""])

    async def receive() -> Message:
        body = next(pieces)
        return {"type": "http.request", "body": body, "more_body": bool(body)}

    assert asyncio.run(read_body(receive, 5)) == b"ab"
