"""Parity once more where steps overlap, and a real model's answers beside those without overlap.

The first tests are those of test_parity.py, over one checkpoint.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from mm_engine import LLM, SamplingParams
from mm_engine.outputs import CompletionOutput, RequestOutput
from mm_engine.request import PromptInputs
from test_parity import (
    IMAGES,
    Fixture,
    _cache_bytes,
    make_fixture,
    test_all_prompts_in_one_batch,
    test_chunks_that_cut_through_images,
    test_neighbours_of_an_aborted_request,
    test_preempted_chunks_and_sliced_images_beside_decodes,
    test_preemption_when_blocks_run_out,
)

__all__ = [
    "test_all_prompts_in_one_batch",
    "test_chunks_that_cut_through_images",
    "test_neighbours_of_an_aborted_request",
    "test_preempted_chunks_and_sliced_images_beside_decodes",
    "test_preemption_when_blocks_run_out",
]

NUM_ROUNDS = 30
POISON = 77  # the token whose embedding is NaN
PARAMS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2, "min_tokens": 4, "repetition_penalty": 1.4},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9, "logprobs": 1},
    {"temperature": 0.8, "seed": 5, "frequency_penalty": 1.2, "top_k": 30},
    {"temperature": 1.2, "seed": 9, "presence_penalty": -0.5, "logit_bias": {POISON: 4.0}},
)


@pytest.fixture(scope="module")
def fixture(tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    return make_fixture(tmp_path_factory.mktemp("checkpoint"), "llama", "clip", -2, "default")


@pytest.fixture
def caches() -> str:
    return "overlap"


@dataclass(frozen=True)
class Arrival:
    ids: tuple[int, ...]
    image: int | None
    params: dict[str, Any]
    max_tokens: int
    n: int
    at: int  # step
    abort_after: int | None  # steps later


def arrive(rng: random.Random) -> Arrival:
    """A request at random; the ids of one in seven hold the one that is NaN."""
    return Arrival(
        ids=tuple(rng.choices(range(71, 85), k=rng.randint(1, 5))),
        image=rng.choice([None, None, 0, 1]),
        params=rng.choice(PARAMS),
        max_tokens=rng.randint(4, 14),
        n=rng.randint(1, 2),
        at=rng.randint(0, 8),
        abort_after=rng.choice([None, None, None, None, 2, 5]),
    )


@pytest.fixture(scope="module")
def llms(fixture: Fixture, request: pytest.FixtureRequest) -> list[LLM]:
    """Without overlap and with it; blocks run out, and one token is NaN."""
    made = []
    num_ranks = request.config.getoption("--tensor-parallel-size")  # they share the heads
    for overlaps in (False, True):
        llm = fixture.llm(
            block_size=4,
            kv_cache_memory=_cache_bytes(fixture, num_tokens=56) // num_ranks,
            max_num_batched_tokens=24,
            max_num_seqs=6,
            async_scheduling=overlaps,
        )
        model: Any = llm.engine.runner._runner
        model.model.language_model.embedding.weight.data[POISON] = float("nan")
        made.append(llm)
    return made


def answer(llm: LLM, arrived: list[Arrival], stops: tuple[int, ...]) -> list[RequestOutput]:
    """What becomes of each, step by step."""
    sums: dict[str, RequestOutput] = {}
    step = 0
    while llm.engine.has_work or step <= max(arrival.at for arrival in arrived):
        for i, arrival in enumerate(arrived):
            if arrival.at == step:
                images = () if arrival.image is None else (IMAGES[arrival.image],)
                prompt = (*arrival.ids, *[llm_image(llm) for _ in images])
                prepared = llm.pipeline.prepare(
                    PromptInputs(prompt_token_ids=prompt, multi_modal_data={"image": images})
                )
                given = {**arrival.params, "max_tokens": arrival.max_tokens, "n": arrival.n}
                params = SamplingParams(**given, stop_token_ids=stops)
                llm.engine.add(llm.pipeline.request(prepared, params, str(i)))
            if arrival.abort_after is not None and arrival.at + arrival.abort_after == step:
                llm.engine.abort(str(i))
        for output in llm.engine.step():
            sums.setdefault(output.request_id, RequestOutput(output.request_id)).extend(output)
        step += 1
    assert llm.engine.stats().num_used_blocks == 0
    return [sums[str(i)] for i in range(len(arrived))]


def llm_image(llm: LLM) -> int:
    """The token that stands for an image."""
    return int(llm.pipeline.ctx.hf_config.image_token_id)


def check_same(expected: CompletionOutput, got: CompletionOutput, num_tokens: int | None) -> None:
    """Equal, up to rounding; the first `num_tokens` of both where one was aborted."""
    assert got.token_ids[:num_tokens] == expected.token_ids[:num_tokens]
    if num_tokens is None:
        assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason)
    pairs = zip(expected.logprobs or (), got.logprobs or (), strict=num_tokens is None)
    for wanted, entries in pairs:
        assert wanted.keys() == entries.keys()
        for token_id, entry in wanted.items():
            assert entries[token_id].logprob == pytest.approx(entry.logprob, abs=1e-4)


def test_answers_are_those_of_steps_one_by_one(llms: list[LLM]) -> None:
    seen: Counter[str] = Counter()
    for seed in range(NUM_ROUNDS):
        rng = random.Random(seed)
        arrived = [arrive(rng) for _ in range(rng.randint(3, 8))]
        stops = tuple(id_ for id_ in rng.sample(range(60, 380), 40) if id_ != POISON)
        expected, got = (answer(llm, arrived, stops) for llm in llms)
        for arrival, want, have in zip(arrived, expected, got, strict=True):
            assert want.finished and have.finished
            ends = [new.finish_reason for new in want.outputs + have.outputs]
            seen.update([*map(str, ends), f"error: {have.error is not None}"])
            if arrival.abort_after is None:
                assert have.error == want.error
            shortest = None
            if "abort" in ends:
                shortest = min(len(new.token_ids) for new in want.outputs + have.outputs)
            if want.error is None and have.error is None:
                for one, other in zip(want.outputs, have.outputs, strict=True):
                    check_same(one, other, shortest)
    assert all(llm.engine.stats().num_preemptions > 0 for llm in llms)
    assert min(seen[end] for end in ("stop", "length", "abort", "error: True")) >= 5, seen
