"""Structured answers don't depend on how the engine gets to them: drafts, overlap, preemption."""

from __future__ import annotations

from typing import Any

import pytest

from mm_engine import LLM, RequestOutput, SamplingParams, StructuredOutputsParams

LIST = r'(\["cat", "cat", "dog"\]\n){1,6}'
SCHEMA = {"type": "array", "items": {"enum": ["cat", "dog"]}, "minItems": 6, "maxItems": 12}
PROMPTS = ('["cat", "cat", "dog"]\n' * 3, "What is it?", "Name all of them:", "Hello there")
PARAMS = [
    SamplingParams(
        temperature=0.0, max_tokens=90, structured_outputs=StructuredOutputsParams(regex=LIST)
    ),
    SamplingParams(
        temperature=0.0, max_tokens=90, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    ),
    SamplingParams(
        temperature=1.0,
        seed=4,
        n=2,
        max_tokens=60,
        structured_outputs=StructuredOutputsParams(json=SCHEMA),
    ),
    SamplingParams(temperature=0.0, max_tokens=40),
]
DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_min": 2}


def answers(**options: Any) -> tuple[LLM, list[RequestOutput]]:
    defaults: dict[str, Any] = {"kv_cache_memory": 2**23, "block_size": 16}
    llm = LLM(dtype="float32", progress=False, **(defaults | options))
    return llm, llm.generate(list(PROMPTS), PARAMS, use_tqdm=False)


def told(outputs: list[RequestOutput]) -> list[Any]:
    return [[(o.text, o.token_ids, o.finish_reason) for o in out.outputs] for out in outputs]


def failures(caplog: pytest.LogCaptureFixture) -> list[str]:
    """What the fault barrier logged."""
    return [text for text in caplog.messages if "failed" in text]


@pytest.fixture(scope="module")
def plain() -> list[Any]:
    return told(answers()[1])


def test_they_are_as_long_as_their_structure(plain: list[Any]) -> None:
    (whole,), (items,), drawn, (free,) = plain
    assert whole[2] == items[2] == "stop" and whole[0].endswith('"dog"]\n')
    assert all(text.startswith('["') for text, _, _ in drawn)
    assert not free[0].startswith('["')


def test_with_drafts(plain: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    llm, outputs = answers(speculative_config=DRAFTS)
    assert not failures(caplog)  # no step was run again
    assert told(outputs) == plain
    assert llm.engine.stats().num_accepted_tokens > 10  # drafts were there, and right


def test_with_steps_that_overlap(plain: list[Any], caplog: pytest.LogCaptureFixture) -> None:
    llm, outputs = answers(async_scheduling=True)
    assert not failures(caplog)
    assert llm.engine.max_in_flight == 1
    assert told(outputs) == plain


def test_when_they_are_preempted(plain: list[Any]) -> None:
    llm, _ = answers()
    per_block = 2**23 // llm.engine.kv_cache.num_blocks
    llm, outputs = answers(kv_cache_memory=per_block * 12)
    assert llm.engine.stats().num_preemptions > 0
    assert told(outputs) == plain


def test_one_whose_grammar_runs_away_fails_alone(plain: list[Any]) -> None:
    ambiguous = StructuredOutputsParams(grammar='root ::= root root root | [a-z] | " " | ""')
    llm = LLM(dtype="float32", progress=False, kv_cache_memory=2**24)
    runaway = SamplingParams(
        temperature=0.0, max_tokens=900, structured_outputs=ambiguous, logit_bias={2: -100.0}
    )
    outputs = llm.generate([*PROMPTS, "x"], [*PARAMS, runaway], use_tqdm=False)
    assert told(outputs[:-1]) == plain
    assert outputs[-1].error is not None
    assert "takes too long to follow" in outputs[-1].error.message
    assert llm.engine.kv_cache.num_used_blocks == 0
