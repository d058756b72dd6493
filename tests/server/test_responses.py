"""`/v1/responses`, asked with the `openai` client."""

from __future__ import annotations

import json
import math
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

from serving import ServerProcess, wait_until

MODEL = "demo"
ROUTE = "/v1/responses"
LOGPROBS: Any = ["message.output_text.logprobs"]
AROUND_THE_TEXT = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
]
BEHIND_THE_TEXT = [
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
]


def asked(*urls: str, text: str = "Describe the image.") -> list[Any]:
    parts: list[Any] = [{"type": "input_image", "image_url": url, "detail": "auto"} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "input_text", "text": text}]}]


def body(*urls: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": asked(*urls), "temperature": 0, **fields}


def chat_text(client: OpenAI, messages: list[Any], **fields: Any) -> str | None:
    request: dict[str, Any] = {"model": MODEL, "messages": messages, "temperature": 0, **fields}
    return client.chat.completions.create(**request).choices[0].message.content


def test_a_response_is_complete(client: OpenAI, image_url: str) -> None:
    response = client.responses.create(
        **body(image_url, max_output_tokens=40), metadata={"k": "v"}, user="u", instructions="Go."
    )
    assert response.id.startswith("resp_")
    assert (response.object, response.model, response.status) == ("response", MODEL, "completed")
    assert response.error is None and response.incomplete_details is None
    assert response.completed_at and response.completed_at >= response.created_at
    (message,) = response.output
    assert message.type == "message" and message.id.startswith("msg_")
    assert (message.role, message.status) == ("assistant", "completed")
    (part,) = message.content
    assert part.type == "output_text"
    assert part.text == response.output_text != ""
    assert (part.annotations, part.logprobs) == ([], [])
    usage = response.usage
    assert usage and usage.input_tokens > 0 and usage.output_tokens > 0
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.output_tokens_details.reasoning_tokens == 0
    assert usage.input_tokens_details.cached_tokens >= 0
    assert (response.instructions, response.metadata, response.user) == ("Go.", {"k": "v"}, "u")
    assert (response.temperature, response.top_p, response.max_output_tokens) == (0, 1, 40)
    assert (response.tools, response.tool_choice, response.truncation) == ([], "auto", "disabled")
    assert response.text and response.text.format and response.text.format.type == "text"
    assert response.model_extra is not None and response.model_extra["store"] is False
    # What the client's types want is there: reading it strictly finds no fault.
    type(response).model_validate(json.loads(response.model_dump_json(warnings=False)))


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_it_says_what_a_chat_says(client: OpenAI, image_url: str, num_images: int) -> None:
    urls = [image_url] * num_images
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    chat = [
        {"role": "user", "content": [*parts, {"type": "text", "text": "Describe the image."}]},
    ]
    response = client.responses.create(**body(*urls, max_output_tokens=24))
    assert response.output_text == chat_text(client, chat, max_tokens=24) != ""


def test_a_picture_makes_a_difference(client: OpenAI, image_url: str) -> None:
    with_picture = client.responses.create(**body(image_url, max_output_tokens=24))
    without = client.responses.create(**body(max_output_tokens=24))
    assert with_picture.usage and without.usage
    assert with_picture.usage.input_tokens > without.usage.input_tokens + 50


def test_a_string_is_a_users_message_and_instructions_come_first(client: OpenAI) -> None:
    request = {"model": MODEL, "temperature": 0, "max_output_tokens": 12}
    said = client.responses.create(**request, input="Hello.", instructions="Be brief.").output_text
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello."}]
    assert said == chat_text(client, chat, max_tokens=12)
    without = client.responses.create(**request, input="Hello.")
    longer = client.responses.create(**request, input="Hello.", instructions="Be brief.")
    assert without.usage and longer.usage
    assert longer.usage.input_tokens > without.usage.input_tokens + 3


def test_a_conversation_goes_on_with_the_output_of_before(client: OpenAI, image_url: str) -> None:
    first = client.responses.create(**body(image_url, max_output_tokens=8))
    history: list[Any] = [*asked(image_url), *(item.model_dump() for item in first.output)]
    history += [{"type": "message", "role": "developer", "content": "Be brief."}]
    history += [{"role": "user", "content": "Go on."}]
    second = client.responses.create(
        model=MODEL, input=history, temperature=0, max_output_tokens=8, store=False
    )
    chat = [
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": image_url}},
                {"type": "text", "text": "Describe the image."},
            ],
        },
        {"role": "assistant", "content": [{"type": "text", "text": first.output_text}]},
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Go on."},
    ]
    assert second.output_text == chat_text(client, chat, max_tokens=8)


def test_what_is_cut_off_is_incomplete(client: OpenAI, image_url: str) -> None:
    request = body(image_url, max_output_tokens=3, extra_body={"ignore_eos": True})
    response = client.responses.create(**request)
    assert response.status == "incomplete" and response.completed_at is None
    assert response.incomplete_details
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert message.type == "message" and message.status == "incomplete"
    assert response.usage and response.usage.output_tokens == 3
    last = list(client.responses.create(**request, stream=True))[-1]
    assert last.type == "response.incomplete"
    assert last.response.incomplete_details == response.incomplete_details


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_a_stream_is_the_whole_response_in_pieces(
    client: OpenAI, image_url: str, num_images: int
) -> None:
    request = body(*[image_url] * num_images, max_output_tokens=40)
    whole = client.responses.create(**request)
    events: list[Any] = list(client.responses.create(**request, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type for event in events]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1
    assert types == [
        *AROUND_THE_TEXT,
        *["response.output_text.delta"] * len(deltas),
        *BEHIND_THE_TEXT,
        f"response.{whole.status}",
    ]
    created, *_, done, part_done, item_done, last = events
    assert (created.response.status, created.response.output) == ("in_progress", [])
    assert created.response.usage is None
    assert events[2].item.status == "in_progress" and events[2].item.content == []
    assert events[3].part.text == ""
    said = "".join(deltas)
    assert said == done.text == part_done.part.text == whole.output_text
    assert last.response.output_text == said
    assert item_done.item == last.response.output[0]
    assert last.response.usage.output_tokens == whole.usage.output_tokens  # type: ignore[union-attr]
    assert {event.response.id for event in (*events[:2], last)} == {last.response.id}
    assert {event.item_id for event in events[3:-2]} == {item_done.item.id}


def test_the_clients_helper_for_streams_follows(client: OpenAI, image_url: str) -> None:
    request = body(image_url, max_output_tokens=40)
    whole = client.responses.create(**request)
    assert whole.status == "completed"
    with client.responses.stream(**request) as stream:
        snapshots = [e.snapshot for e in stream if e.type == "response.output_text.delta"]
        final = stream.get_final_response()
    assert snapshots[-1] == final.output_text == whole.output_text
    assert final.usage and whole.usage
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_the_raw_stream_names_its_events_and_has_no_done(
    server: ServerProcess, image_url: str
) -> None:
    request = body(image_url, max_output_tokens=3, stream=True)
    with server.http.stream("POST", ROUTE, json=request) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        text = response.read().decode()
    blocks = text.removesuffix("\n\n").split("\n\n")
    assert len(blocks) > 8
    for block in blocks:
        name, data = block.split("\n")
        assert name.removeprefix("event: ") == json.loads(data.removeprefix("data: "))["type"]


def test_logprobs_are_those_of_a_chat(client: OpenAI, image_url: str) -> None:
    request = body(image_url, max_output_tokens=8, include=LOGPROBS, top_logprobs=3)
    response = client.responses.create(**request)
    (message,) = response.output
    assert message.type == "message" and message.content[0].type == "output_text"
    logprobs = message.content[0].logprobs or []
    assert response.top_logprobs == 3
    assert response.usage and len(logprobs) == response.usage.output_tokens > 0
    for token in logprobs:
        top = [entry.logprob for entry in token.top_logprobs]
        assert len(top) == 3 and top == sorted(top, reverse=True)
        assert token.logprob == top[0]  # greedy
        assert sum(map(math.exp, top)) <= 1 + 1e-4
        assert bytes(token.bytes).decode() == token.token
    events: list[Any] = list(client.responses.create(**request, stream=True))
    streamed = [
        token.logprob
        for event in events
        if event.type == "response.output_text.delta"
        for token in event.logprobs
    ]
    (done,) = (event for event in events if event.type == "response.output_text.done")
    expected = pytest.approx([token.logprob for token in logprobs], abs=1e-3)
    assert streamed == expected
    assert [token.logprob for token in done.logprobs] == expected


def test_sampling_fields_are_felt(client: OpenAI, image_url: str) -> None:
    def sample(**fields: Any) -> str:
        request = body(image_url, max_output_tokens=16, extra_body={"ignore_eos": True, **fields})
        request["temperature"] = 1.5
        return client.responses.create(**request).output_text

    assert sample(seed=1) == sample(seed=1)
    assert len({sample(seed=seed) for seed in range(4)}) > 1
    text = sample(seed=1)
    assert sample(seed=1, stop=[text[4:8]]) == text[: text.index(text[4:8])]


def test_what_asks_for_nothing_is_taken(client: OpenAI, image_url: str) -> None:
    response = client.responses.create(
        **body(image_url, max_output_tokens=2, include=["reasoning.encrypted_content"]),
        store=True,
        background=False,
        tools=[],
        tool_choice="auto",
        text={"format": {"type": "text"}, "verbosity": "medium"},
        truncation="disabled",
        reasoning={"effort": "none"},
        service_tier="auto",
        safety_identifier="me",
        prompt_cache_key="mine",
        previous_response_id=None,
        stream_options=None,
        extra_body={"no_such": [1], "cache_salt": "mine"},
    )
    assert response.model_extra is not None and response.model_extra["store"] is False
    assert (response.safety_identifier, response.prompt_cache_key) == ("me", "mine")


def test_a_cache_salt_separates(client: OpenAI) -> None:
    def cached(salt: str) -> int:
        response = client.responses.create(
            **body(max_output_tokens=2, input="circle " * 60), extra_body={"cache_salt": salt}
        )
        assert response.usage
        return response.usage.input_tokens_details.cached_tokens

    assert [cached("one"), cached("two")] == [0, 0]
    assert cached("one") > 0


@pytest.mark.parametrize("text", ["\0", "naïve café 你好 🙂 مرحبا", "<image></s>", "\u2028\ufeff"])
def test_any_text_is_answered_streamed_and_not(server: ServerProcess, text: str) -> None:
    request = {"input": text, "max_output_tokens": 2}
    for stream in (False, True):
        answer = server.http.post(ROUTE, json={**request, "stream": stream})
        assert answer.status_code == 200
        answer.content.decode("utf-8")


def test_special_tokens_in_input_and_instructions_are_text(client: OpenAI, image_url: str) -> None:
    def num_tokens(*urls: str, text: str, instructions: str) -> int:
        request = body(input=asked(*urls, text=text), instructions=instructions)
        usage = client.responses.create(**request, max_output_tokens=1).usage
        assert usage
        return usage.input_tokens

    plain = num_tokens(text="x", instructions="x")
    assert num_tokens(text="<image> x", instructions="</s> <image> x") - plain in range(5, 60)
    with_image = num_tokens(image_url, text="x", instructions="x")
    assert num_tokens(image_url, text="<image> x", instructions="x") - with_image in range(3, 40)


@pytest.mark.parametrize("character", ["é", "你"])
@pytest.mark.parametrize("logprobs", [False, True])
def test_pieces_of_a_character_are_not_streamed(
    client: OpenAI, server: ServerProcess, character: str, logprobs: bool
) -> None:
    """The model is made to say the character's bytes in any order, each of which is a token."""
    asked_for = {"prompt": character, "add_special_tokens": False}
    tokens = server.http.post("/tokenize", json=asked_for).json()["tokens"]
    bias = dict.fromkeys(map(str, tokens[-len(character.encode()) :]), 100)
    request = body(
        max_output_tokens=300,  # events grow longer where the server is slower than the engine
        include=LOGPROBS if logprobs else [],
        extra_body={"logit_bias": bias, "ignore_eos": True, "seed": 5},
    )
    request["temperature"] = 2.0
    whole = client.responses.create(**request).output_text
    assert any(c > "\x7f" and c != "\ufffd" for c in whole), "characters of several tokens"
    events = client.responses.create(**request, stream=True)
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert len(deltas) > 3
    assert "".join(deltas) == whole


@pytest.mark.parametrize("method", ["GET", "DELETE", "POST", "PUT"])
@pytest.mark.parametrize("path", ["resp_s3cr3t", "resp_s3cr3t/cancel", "resp_s3cr3t/input_items"])
def test_nothing_is_stored(server: ServerProcess, method: str, path: str) -> None:
    response = server.http.request(method, f"{ROUTE}/{path}")
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("not_stored", "invalid_request_error")
    assert "not stored" in error["message"]
    assert "s3cr3t" not in response.text
    name = "{response_id}/{rest}" if "/" in path else "{response_id}"
    line = f"{method} /v1/responses/{name} 404"
    wait_until(lambda: line in server.output, "its line in the log")
    assert "s3cr3t" not in server.output


def test_the_client_is_told_that_nothing_is_stored(client: OpenAI) -> None:
    response_id = client.responses.create(**body(max_output_tokens=2)).id
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match="not stored"):
            call(response_id)  # type: ignore[operator]


def test_other_methods_are_405(server: ServerProcess) -> None:
    response: httpx.Response = server.http.get(ROUTE)
    assert response.status_code == 405
    assert response.headers["allow"] == "POST"
