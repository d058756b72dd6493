"""`/v1/completions`, asked with the `openai` client."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from mm_engine.outputs import CompletionOutput, RequestOutput
from mm_engine.server.completions import CompletionReply

ASK: dict[str, Any] = {"model": "demo", "temperature": 0, "max_tokens": 8}
LONG = {**ASK, "extra_body": {"ignore_eos": True}}
TEXT = "How many objects are there?"


def test_a_streamed_completion_is_the_whole_one_in_pieces(client: OpenAI) -> None:
    whole = client.completions.create(**LONG, prompt=TEXT)
    chunks = list(client.completions.create(**LONG, prompt=TEXT, stream=True))
    assert whole.choices[0].text
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason == "length"
    assert whole.usage and whole.usage.completion_tokens == 8


def test_several_prompts_are_answered_each_as_if_alone(client: OpenAI) -> None:
    prompts = [TEXT, "What colour is", "circle"]
    alone = [client.completions.create(**LONG, prompt=p).choices[0].text for p in prompts]
    together = client.completions.create(**LONG, prompt=prompts)
    assert [choice.text for choice in together.choices] == alone
    assert [choice.index for choice in together.choices] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in client.completions.create(**LONG, prompt=prompts, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == alone


def test_choices_of_one_prompt_stand_together(client: OpenAI) -> None:
    request = {**LONG, "temperature": 1.5, "seed": 3, "n": 2}
    answer = client.completions.create(**request, prompt=[TEXT, "circle"])
    first = client.completions.create(**request, prompt=TEXT)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [c.text for c in answer.choices[:2]] == [c.text for c in first.choices]
    assert answer.usage and answer.usage.completion_tokens == 32


def test_token_ids_are_a_prompt(client: OpenAI) -> None:
    one = client.completions.create(**LONG, prompt=[1, 60, 61, 62])
    many = client.completions.create(**LONG, prompt=[[1, 60, 61, 62], [1, 70]])
    assert one.usage and one.usage.prompt_tokens == 4
    assert many.usage and many.usage.prompt_tokens == 6
    assert many.choices[0].text == one.choices[0].text


def test_without_a_limit_there_are_16_tokens(client: OpenAI) -> None:
    request = {**LONG, "max_tokens": None}
    answer = client.completions.create(**request, prompt=TEXT)
    assert answer.usage and answer.usage.completion_tokens == 16


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_echo_puts_the_prompt_before_its_completion(client: OpenAI, stream: bool) -> None:
    plain = [c.text for c in client.completions.create(**LONG, prompt=[TEXT, "circle"]).choices]
    request = {**LONG, "echo": True, "prompt": [TEXT, "circle"]}
    echoed = ["", ""]
    if stream:
        for chunk in client.completions.create(**request, stream=True):
            echoed[chunk.choices[0].index] += chunk.choices[0].text
    else:
        echoed = [choice.text for choice in client.completions.create(**request).choices]
    assert echoed == [TEXT + plain[0], "circle" + plain[1]]


def test_logprobs_have_the_completions_shape(client: OpenAI) -> None:
    answer = client.completions.create(**LONG, prompt=TEXT, logprobs=2).choices[0]
    logprobs = answer.logprobs
    assert logprobs and logprobs.tokens and logprobs.token_logprobs
    assert logprobs.text_offset and logprobs.top_logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == 8
    ends = [o + len(t) for o, t in zip(logprobs.text_offset, logprobs.tokens, strict=True)]
    assert logprobs.text_offset == [0, *ends[:-1]]
    for token, own, top in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        assert 1 <= len(top) <= 3
        assert top[token] == own == max(top.values())
    chunks = client.completions.create(**LONG, prompt=TEXT, logprobs=2, stream=True)
    offsets = [o for c in chunks if (lp := c.choices[0].logprobs) for o in lp.text_offset or []]
    assert offsets == logprobs.text_offset


def test_usage_comes_at_the_end_of_a_stream_if_asked(client: OpenAI) -> None:
    chunks = list(
        client.completions.create(
            **LONG, prompt=["a", "b"], stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage and chunks[-1].usage.completion_tokens == 16


def test_an_echo_doesnt_wait_for_text() -> None:
    """The first tokens may make no character yet."""
    reply = CompletionReply(model="m", include_usage=False, num_choices=1, num_top=0, echoes=["a"])
    news = [CompletionOutput(0, "", [7]), CompletionOutput(0, "", [8]), CompletionOutput(0, "b")]
    events = [list(reply.events(0, RequestOutput("x", [new]))) for new in news]
    assert [[e["choices"][0]["text"] for e in told] for told in events] == [["a"], [], ["b"]]
