"""Parity once more with speculative decoding: drafts change no token, whichever way a prompt goes.

The tests are those of test_parity.py, over fewer checkpoints. There they also see to it that
drafts were right and wrong.
"""

from __future__ import annotations

import pytest

from checkpoints import BACKBONES
from mm_engine import SamplingParams
from parity import Case
from test_parity import (
    OPTIONS,
    Fixture,
    make_fixture,
    test_all_prompts_in_one_batch,
    test_chunks_that_cut_through_images,
    test_each_prompt_alone,
    test_neighbours_of_an_aborted_request,
    test_preempted_chunks_and_sliced_images_beside_decodes,
    test_preemption_when_blocks_run_out,
)

__all__ = [
    "test_all_prompts_in_one_batch",
    "test_chunks_that_cut_through_images",
    "test_each_prompt_alone",
    "test_neighbours_of_an_aborted_request",
    "test_preempted_chunks_and_sliced_images_beside_decodes",
    "test_preemption_when_blocks_run_out",
]


@pytest.fixture(scope="module", params=BACKBONES)
def fixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    """One checkpoint for each backbone: what a draft may break is the decoder's work."""
    tower = "siglip" if request.param == "mistral" else "clip"
    return make_fixture(tmp_path_factory.mktemp("checkpoint"), request.param, tower, -2, "default")


@pytest.fixture(params=[name for name in OPTIONS if "drafts" in name])
def caches(request: pytest.FixtureRequest) -> str:
    """The name of one of `OPTIONS`."""
    name: str = request.param
    return name


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.2, "seed": 6},
        {"temperature": 0.3, "top_p": 0.8, "repetition_penalty": 0.8, "seed": 4, "n": 2},
        {
            "temperature": 0.0,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.3,
            "min_tokens": 30,
            "logprobs": 3,
        },
        {"temperature": 0.3, "logit_bias": {70: 1.0}, "top_k": 20, "seed": 5, "logprobs": 0},
    ],
    ids=["random", "top-p", "penalised", "biased"],
)
def test_every_kind_of_sampling_brings_the_same_answer(
    fixture: Fixture, params: dict[str, object]
) -> None:
    prompts = ["Hello there, what is in the", "x y x y x y", "How many objects are there?"]
    sampling = SamplingParams(**{"max_tokens": 40, **params})
    answers = []
    for options in OPTIONS["cached"], OPTIONS["cached-drafts"]:
        llm = fixture.llm(**options)
        outputs = llm.generate(prompts, sampling)
        answers.append([done for output in outputs for done in output.outputs])
    stats = llm.engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    for expected, got in zip(*answers, strict=True):
        assert got.token_ids == expected.token_ids
        assert (got.text, got.finish_reason) == (expected.text, expected.finish_reason)
        if expected.logprobs is None:
            assert got.logprobs is None
            continue
        for entries, others in zip(expected.logprobs, got.logprobs or (), strict=True):
            assert list(entries) == list(others)
            for token_id, entry in entries.items():
                assert others[token_id].logprob == pytest.approx(entry.logprob, abs=1e-4)
                assert others[token_id].rank == entry.rank


def test_llm_takes_vllms_speculative_config(fixture: Fixture) -> None:
    config = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 1}
    llm = fixture.llm(speculative_config=config)
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    (output,) = llm.generate("x y x y x y", sampling)
    stats = llm.engine.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    assert stats.num_steps == 40 - stats.num_accepted_tokens
    case = Case("x y x y x y")
    fixture.oracle.check(case, fixture.oracle.answer(case, 40), output.outputs[0].token_ids)
