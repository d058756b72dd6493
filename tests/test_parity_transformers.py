"""Text backbones that the native decoder doesn't cover: greedy tokens equal transformers' too."""

from __future__ import annotations

from typing import Any

import pytest

from backbones import OTHER_BACKBONES, WINDOW
from checkpoints import make_llava
from mm_engine import LLM, SamplingParams
from mm_engine.attention.backend import Attention
from mm_engine.models import TransformersDecoder
from parity import Oracle, Trace
from test_parity import CASES, Fixture, num_images, prompts

NUM_TOKENS = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)


@pytest.fixture(scope="module", params=OTHER_BACKBONES)
def fixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    """One checkpoint of each backbone."""
    path = make_llava(tmp_path_factory.mktemp("checkpoint"), backbone=request.param)
    oracle = Oracle(path)
    answers = [oracle.answer(case, NUM_TOKENS) for case in CASES]
    assert len({token for answer in answers for token in answer}) > 20, "answers must vary"
    assert max(len(oracle.expanded_ids(case)) for case in CASES) > WINDOW, "windows must matter"
    return Fixture(path, oracle, answers)


def start(fixture: Fixture, **options: Any) -> LLM:
    """An engine whose backbone is transformers' own."""
    llm = fixture.llm(**options)
    assert isinstance(model_of(llm).language_model, TransformersDecoder)
    return llm


def model_of(llm: LLM) -> Any:
    return llm.engine.runner._runner.model  # type: ignore[attr-defined]


def test_each_prompt_alone(fixture: Fixture) -> None:
    llm = start(fixture)
    fixture.check([llm.generate(prompt, GREEDY)[0] for prompt in prompts()])


def test_probabilities_are_transformers(fixture: Fixture) -> None:
    """A scale or cap on logits leaves greedy tokens as they are, and changes what is sampled."""
    params = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True, logprobs=20)
    for case, output in zip(CASES, start(fixture).generate(prompts(), params), strict=True):
        answer = output.outputs[0]
        assert answer.logprobs is not None
        # A placeholder in the answer is an image to transformers' forward pass.
        image = fixture.oracle.model.config.image_token_id
        num = [*answer.token_ids, image].index(image)
        logits = fixture.oracle.logits(case, answer.token_ids[:num])
        for expected, got in zip(logits.log_softmax(-1), answer.logprobs, strict=False):
            assert len(got) >= 20
            for token, logprob in got.items():
                assert logprob.logprob == pytest.approx(float(expected[token]), abs=1e-3)


def test_all_prompts_in_one_batch(fixture: Fixture) -> None:
    llm = start(fixture)
    trace = Trace.of(llm)
    fixture.check(llm.generate(prompts(), GREEDY))
    assert trace.most_sequences == len(CASES)
    assert llm.engine.stats().num_encodes == num_images(CASES)


def test_chunks_that_cut_through_images(fixture: Fixture) -> None:
    llm = start(fixture, max_num_batched_tokens=11, max_num_seqs=4, block_size=4)
    trace = Trace.of(llm)
    fixture.check(llm.generate(prompts(), GREEDY))
    assert trace.cut_images > 0
    assert trace.mixed_steps > 0


def test_preemption_when_blocks_run_out(fixture: Fixture) -> None:
    layers = [layer for layer in model_of(start(fixture)).modules() if isinstance(layer, Attention)]
    bytes_per_token = sum(2 * 4 * layer.num_kv_heads * layer.head_dim for layer in layers)
    llm = start(fixture, block_size=4, kv_cache_memory=160 * bytes_per_token)
    fixture.check(llm.generate(prompts(), GREEDY))
    stats = llm.engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_used_blocks == 0


def test_a_native_backbone_through_transformers_gives_the_same(
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    if request.config.getoption("--tensor-parallel-size") > 1:
        pytest.skip("the model is patched in this process, and other ranks would compute another")
    path = make_llava(tmp_path_factory.mktemp("checkpoint"), backbone="qwen2")
    oracle = Oracle(path)
    native = Fixture(path, oracle, []).llm()
    answers = [output.outputs[0].token_ids for output in native.generate(prompts(), GREEDY)]
    assert not isinstance(model_of(native).language_model, TransformersDecoder)
    monkeypatch.setattr("mm_llava.model.build_decoder", TransformersDecoder)
    fixture = Fixture(path, oracle, answers)
    fixture.check(start(fixture).generate(prompts(), GREEDY))
