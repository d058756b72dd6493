"""`/v1/chat/completions`, asked with the `openai` client."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from openai import OpenAI

from serving import ServerProcess, sse_events

MODEL = "demo"


def asked(*urls: str, text: str = "Describe the image.") -> list[Any]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def body(image_url: str, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": asked(image_url), "temperature": 0, **fields}


@pytest.mark.parametrize("num_images", [0, 1, 2])
def test_a_streamed_answer_is_the_whole_one_in_pieces(
    client: OpenAI, image_url: str, num_images: int
) -> None:
    request = body(image_url, messages=asked(*[image_url] * num_images), max_tokens=24)
    whole = client.chat.completions.create(**request)
    chunks = list(client.chat.completions.create(**request, stream=True))
    assert whole.choices[0].message.content
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == (
        whole.choices[0].message.content
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    reasons = [chunk.choices[0].finish_reason for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + [whole.choices[0].finish_reason]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_picture_makes_a_difference(client: OpenAI, image_url: str) -> None:
    whole = client.chat.completions.create(**body(image_url, max_tokens=24))
    without = client.chat.completions.create(**body(image_url, max_tokens=24, messages=asked()))
    assert whole.usage and without.usage
    assert whole.usage.prompt_tokens > without.usage.prompt_tokens + 50


def test_usage_counts_the_prompt_once_and_all_completions(client: OpenAI, image_url: str) -> None:
    request = body(image_url, max_tokens=5, extra_body={"ignore_eos": True})
    one = client.chat.completions.create(**request).usage
    three = client.chat.completions.create(**request, n=3).usage
    assert one and three
    assert (one.completion_tokens, three.completion_tokens) == (5, 15)
    assert one.prompt_tokens == three.prompt_tokens
    assert three.total_tokens == three.prompt_tokens + 15


def test_a_stream_ends_with_usage_only_if_asked(client: OpenAI, image_url: str) -> None:
    request = body(image_url, max_tokens=5, extra_body={"ignore_eos": True}, stream=True)
    plain = list(client.chat.completions.create(**request))
    counted = list(
        client.chat.completions.create(**request, stream_options={"include_usage": True})
    )
    assert all(chunk.usage is None for chunk in (*plain, *counted[:-1]))
    assert counted[-1].choices == []
    assert counted[-1].usage and counted[-1].usage.completion_tokens == 5


def test_n_gives_different_choices_that_are_streamed_apart(client: OpenAI, image_url: str) -> None:
    request = body(
        image_url, n=3, temperature=1.5, seed=7, max_tokens=12, extra_body={"ignore_eos": True}
    )
    whole = client.chat.completions.create(**request)
    texts = [choice.message.content for choice in whole.choices]
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    assert len(set(texts)) == 3
    streamed = ["", "", ""]
    for chunk in client.chat.completions.create(**request, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


def test_a_seed_makes_sampling_reproducible(client: OpenAI, image_url: str) -> None:
    def sample(seed: int) -> str | None:
        request = body(image_url, temperature=1.5, seed=seed, max_tokens=16)
        return client.chat.completions.create(**request).choices[0].message.content

    assert sample(1) == sample(1)
    assert len({sample(seed) for seed in range(4)}) > 1


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_stop_strings_end_the_answer_and_are_not_sent(
    client: OpenAI, image_url: str, stream: bool
) -> None:
    whole = client.chat.completions.create(**body(image_url, max_tokens=24))
    text = whole.choices[0].message.content or ""
    stop = text[len(text) // 2 :][:4]
    request = body(image_url, max_tokens=24, stop=[stop, "never said"])
    expected = text[: text.index(stop)]
    if stream:
        chunks = list(client.chat.completions.create(**request, stream=True))
        said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        last = chunks[-1].choices[0]
    else:
        last = client.chat.completions.create(**request).choices[0]
        said = last.message.content
    assert said == expected
    assert last.finish_reason == "stop"
    assert last.stop_reason == stop


def test_logprobs_are_those_of_the_tokens(client: OpenAI, image_url: str) -> None:
    request = body(image_url, max_tokens=8, logprobs=True, top_logprobs=3)
    whole = client.chat.completions.create(**request).choices[0]
    assert whole.logprobs and whole.logprobs.content
    for token in whole.logprobs.content:
        top = [entry.logprob for entry in token.top_logprobs]
        assert len(top) == 3
        assert top == sorted(top, reverse=True)
        assert token.logprob == top[0]  # greedy
        assert sum(map(math.exp, top)) <= 1 + 1e-4
        assert bytes(token.bytes or []).decode() == token.token
    streamed = [
        token.logprob
        for chunk in client.chat.completions.create(**request, stream=True)
        if chunk.choices[0].logprobs
        for token in chunk.choices[0].logprobs.content or []
    ]
    assert streamed == pytest.approx([token.logprob for token in whole.logprobs.content], abs=1e-3)


def test_no_logprobs_unless_asked(client: OpenAI, image_url: str) -> None:
    assert client.chat.completions.create(**body(image_url)).choices[0].logprobs is None
    chosen_only = client.chat.completions.create(**body(image_url, logprobs=True)).choices[0]
    assert chosen_only.logprobs and chosen_only.logprobs.content
    assert chosen_only.logprobs.content[0].top_logprobs == []


def test_logit_bias_is_felt(client: OpenAI, image_url: str) -> None:
    request = body(image_url, max_tokens=6, extra_body={"ignore_eos": True})
    plain = client.chat.completions.create(**request).choices[0].message.content
    biased = client.chat.completions.create(**request, logit_bias={"60": 100})
    text = biased.choices[0].message.content or ""
    assert text != plain
    assert len(set(text.split()) or set(text)) == 1


def test_min_tokens_and_ignore_eos_go_past_the_end(client: OpenAI, image_url: str) -> None:
    request = body(image_url, max_tokens=60)
    plain = client.chat.completions.create(**request)
    longer = client.chat.completions.create(**request, extra_body={"min_tokens": 50})
    assert plain.choices[0].finish_reason == "stop"
    assert plain.usage and plain.usage.completion_tokens < 50
    assert longer.usage and longer.usage.completion_tokens >= 50


def test_max_completion_tokens_is_the_newer_name(client: OpenAI, image_url: str) -> None:
    request = body(image_url, max_completion_tokens=3, extra_body={"ignore_eos": True})
    answer = client.chat.completions.create(**request)
    assert answer.usage and answer.usage.completion_tokens == 3
    assert answer.choices[0].finish_reason == "length"


def test_the_raw_stream_is_sse_and_ends_with_done(server: ServerProcess, image_url: str) -> None:
    request = body(image_url, stream=True, max_tokens=3)
    with server.http.stream("POST", "/v1/chat/completions", json=request) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(sse_events(response.iter_lines()))
    assert events[-1] == "[DONE]"
    for event in events[:-1]:
        chunk = json.loads(event)
        assert chunk["object"] == "chat.completion.chunk"
        assert "usage" not in chunk
        assert {"index", "delta", "logprobs", "finish_reason"} <= set(chunk["choices"][0])


def test_fields_may_be_null_and_unknown_ones_are_ignored(
    server: ServerProcess, image_url: str
) -> None:
    nulls = dict.fromkeys(
        ("n", "stop", "seed", "top_p", "logit_bias", "max_tokens", "tools", "stream_options")
    )
    request = {**body(image_url), **nulls, "tool_choice": "none", "user": "me", "no_such": [1]}
    request["response_format"] = {"type": "text"}
    assert server.http.post("/v1/chat/completions", json=request).status_code == 200


def test_a_turn_of_the_assistant_and_a_system_message_are_part_of_the_prompt(
    client: OpenAI,
) -> None:
    messages: list[Any] = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Go on."},
    ]
    request = {"model": MODEL, "temperature": 0, "max_tokens": 2}
    long = client.chat.completions.create(**request, messages=messages)  # type: ignore[call-overload]
    short = client.chat.completions.create(**request, messages=messages[1:2])  # type: ignore[call-overload]
    assert long.usage.prompt_tokens > short.usage.prompt_tokens + 5


@pytest.mark.parametrize("text", ["\0", "naïve café 你好 🙂 مرحبا", "<image></s>", "\u2028\ufeff"])
def test_any_text_is_answered_streamed_and_not(server: ServerProcess, text: str) -> None:
    request = {"messages": [{"role": "user", "content": text}], "max_tokens": 2}
    for stream in (False, True):
        answer = server.http.post("/v1/chat/completions", json={**request, "stream": stream})
        assert answer.status_code == 200
        answer.content.decode("utf-8")
