"""Speculative decoding over HTTP: answers as without, several tokens in an event, and counts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from openai import OpenAI

from odd_models import PACED, plugin_flags
from serving import FLAGS, ServerProcess, wait_until

CONFIG = '{"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 1}'
TEXT = "circle, square, circle, square, circle, square"
ASK: dict[str, Any] = {
    "model": "demo",
    "temperature": 0,
    "max_tokens": 40,
    "extra_body": {"ignore_eos": True},
}
CHAT: dict[str, Any] = {**ASK, "messages": [{"role": "user", "content": TEXT}], "logprobs": True}


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose model is slower than it is: what comes in one event came in one step."""
    folder = tmp_path_factory.mktemp("paced")
    with ServerProcess(folder, *FLAGS, *plugin_flags(folder, PACED)) as started:
        yield started


@pytest.fixture
def client(paced: ServerProcess) -> Iterator[OpenAI]:
    with paced.client() as opened:
        yield opened


@pytest.fixture(scope="module")
def drafting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The same, with drafts."""
    folder = tmp_path_factory.mktemp("drafting")
    flags = (*FLAGS, *plugin_flags(folder, PACED), "--speculative-config", CONFIG)
    with ServerProcess(folder, *flags) as started:
        yield started


@pytest.fixture
def guessing(drafting: ServerProcess) -> Iterator[OpenAI]:
    with drafting.client() as client:
        yield client


def test_chat_streams_the_same_tokens_in_fewer_events(client: OpenAI, guessing: OpenAI) -> None:
    expected = client.chat.completions.create(**CHAT, top_logprobs=2).choices[0]
    assert expected.logprobs and expected.logprobs.content
    for asked in (client, guessing):
        whole = asked.chat.completions.create(**CHAT, top_logprobs=2)
        assert whole.usage and whole.usage.completion_tokens == 40
        assert whole.choices[0].message.content == expected.message.content
        chunks = list(asked.chat.completions.create(**CHAT, top_logprobs=2, stream=True))
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == expected.message.content
        told = [chunk.choices[0].logprobs for chunk in chunks]
        pieces = [logprobs.content or [] for logprobs in told if logprobs is not None]
        tokens = [token for piece in pieces for token in piece]
        assert [t.token for t in tokens] == [t.token for t in expected.logprobs.content]
        for got, wanted in zip(tokens, expected.logprobs.content, strict=True):
            assert got.logprob == pytest.approx(wanted.logprob, abs=1e-3)
            assert [t.token for t in got.top_logprobs] == [t.token for t in wanted.top_logprobs]
        assert (max(map(len, pieces)) > 1) == (asked is guessing)


def test_completions_count_offsets_through_events_of_several_tokens(
    client: OpenAI, guessing: OpenAI
) -> None:
    expected = client.completions.create(**ASK, prompt=TEXT, logprobs=1).choices[0].logprobs
    assert expected and expected.text_offset
    offsets: list[int] = []
    tokens: list[str] = []
    chunks = guessing.completions.create(**ASK, prompt=TEXT, logprobs=1, stream=True)
    for chunk in chunks:
        logprobs = chunk.choices[0].logprobs
        if logprobs is not None:
            offsets += logprobs.text_offset or []
            tokens += logprobs.tokens or []
    assert (tokens, offsets) == (expected.tokens, expected.text_offset)


def test_counts_are_told(drafting: ServerProcess, guessing: OpenAI) -> None:
    names = ("num_drafts", "num_draft_tokens", "num_accepted_tokens")

    def counts() -> list[float]:
        return [drafting.metric(f"mm_engine_spec_decode_{name}_total") for name in names]

    gaps = "mm_engine_inter_token_latency_seconds_count"
    before, steps = counts(), drafting.metric("mm_engine_steps_total")
    num_gaps = drafting.metric(gaps)
    guessing.completions.create(**ASK, prompt=TEXT)
    drafts, drafted, accepted = (new - old for new, old in zip(counts(), before, strict=True))
    assert 0 < drafts <= drafted <= 4 * drafts
    assert 0 < accepted <= drafted
    assert drafting.metric("mm_engine_steps_total") - steps == 40 - accepted
    assert drafting.metric(gaps) - num_gaps == 39, "one for each token after the first"
    wait_until(lambda: "drafts accepted " in drafting.output, "the line on the load", 60)


def test_without_the_flag_nothing_is_drafted(server: ServerProcess, client: OpenAI) -> None:
    client.completions.create(**ASK, prompt=TEXT)
    assert server.metric("mm_engine_spec_decode_num_drafts_total") == 0
    assert "drafts accepted" not in server.output
