"""Log-probabilities in both shapes, at their edges."""

from __future__ import annotations

import math

from mm_engine.outputs import CompletionOutput, Logprob
from mm_engine.server.logprobs import MIN_LOGPROB, chat_logprobs, completion_logprobs


def output(*places: dict[int, Logprob]) -> CompletionOutput:
    return CompletionOutput(0, token_ids=[next(iter(p)) for p in places], logprobs=list(places))


def test_minus_infinity_is_a_number() -> None:
    place = {7: Logprob(-math.inf, 9, "x"), 8: Logprob(-0.1, 1, "y")}
    chat = chat_logprobs(output(place), 1)
    assert chat and chat["content"][0]["logprob"] == MIN_LOGPROB
    assert [top["token"] for top in chat["content"][0]["top_logprobs"]] == ["y"]
    completion = completion_logprobs(output(place), 1, 0)
    assert completion and completion["top_logprobs"] == [{"y": -0.1, "x": MIN_LOGPROB}]


def test_of_two_tokens_with_one_text_the_likelier_is_reported() -> None:
    place = {7: Logprob(-2.0, 2, "�"), 8: Logprob(-0.1, 1, "�"), 9: Logprob(-3.0, 3, "z")}
    completion = completion_logprobs(output(place), 3, 0)
    assert completion and completion["top_logprobs"] == [{"�": -0.1, "z": -3.0}]
    assert completion["token_logprobs"] == [-2.0]


def test_offsets_go_on_from_where_the_text_was() -> None:
    places = ({1: Logprob(-1, 1, "ab")}, {2: Logprob(-1, 1, "")}, {3: Logprob(-1, 1, "cde")})
    completion = completion_logprobs(output(*places), 0, 10)
    assert completion and completion["text_offset"] == [10, 12, 12]


def test_none_stays_none() -> None:
    assert chat_logprobs(CompletionOutput(0, token_ids=[1]), 0) is None
    assert completion_logprobs(CompletionOutput(0, token_ids=[1]), 0, 0) is None
