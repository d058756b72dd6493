"""Greedy tokens equal transformers' in float32, whichever way a prompt goes through the engine."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from checkpoints import BACKBONES, TOWERS, make_llava
from mm_engine import LLM, SamplingParams
from mm_engine.engine.pace import Pace
from mm_engine.outputs import RequestOutput
from mm_engine.request import PromptInputs
from parity import Case, Oracle, Trace, picture

NUM_TOKENS = 64
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
IMAGES = tuple(picture(seed, 24 + 8 * seed, 32) for seed in range(4))
CASES = (
    Case("Hello there, what is in the"),
    Case("USER: <image>\nWhat is in the picture? ASSISTANT:", IMAGES[:1]),
    Case("<image>", IMAGES[1:2]),
    Case("USER: a <image> b <image><image> c: which is left of which? ASSISTANT:", IMAGES[:3]),
    Case("How many objects are there? Describe the image. <image>", IMAGES[3:]),
    Case("x"),
)
LAYERS: tuple[int | list[int], ...] = (-2, -1, [-3, -1])
STRATEGIES = ("default", "full")
#: Options with which every cache that can be off is off, or all are on.
CACHES: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"enable_prefix_caching": False, "mm_processor_cache_memory": 0},
}
#: With speculative decoding, too (test_parity_drafts.py). Random answers repeat single tokens.
#: And with steps that overlap (test_parity_overlap.py).
OPTIONS: dict[str, dict[str, Any]] = {
    **CACHES,
    "overlap": {"async_scheduling": True},
    **{
        f"{name}-drafts": {**options, "num_speculative_tokens": 3, "prompt_lookup_min": 1}
        for name, options in CACHES.items()
    },
}
MATRIX = list(product(BACKBONES, TOWERS, LAYERS, STRATEGIES))


@dataclass
class Fixture:
    """A checkpoint, its oracle and the oracle's answers."""

    path: Path
    oracle: Oracle
    answers: list[list[int]]

    def llm(self, **options: Any) -> LLM:
        """The checkpoint in float32."""
        return LLM(str(self.path), dtype="float32", progress=False, **options)

    def check(self, outputs: list[RequestOutput]) -> None:
        """All answers are the oracle's."""
        for case, expected, output in zip(CASES, self.answers, outputs, strict=True):
            assert output.error is None
            assert output.prompt_token_ids == self.oracle.expanded_ids(case)
            self.oracle.check(case, expected, output.outputs[0].token_ids)


def make_fixture(
    path: Path, backbone: str, tower: str, layer: int | list[int], strategy: str
) -> Fixture:
    """Write a checkpoint to `path` and ask transformers."""
    make_llava(path, backbone=backbone, tower=tower, feature_layer=layer, strategy=strategy)
    oracle = Oracle(path)
    answers = [oracle.answer(case, NUM_TOKENS) for case in CASES]
    assert len({token for answer in answers for token in answer}) > 20, "answers must vary"
    return Fixture(path, oracle, answers)


@pytest.fixture(
    scope="module",
    params=MATRIX,
    ids=lambda p: "-".join(str(part).replace(" ", "") for part in p),
)
def fixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    """One checkpoint of the matrix."""
    return make_fixture(tmp_path_factory.mktemp("checkpoint"), *request.param)


def check_again(fixture: Fixture, llm: LLM, caches: str) -> None:
    """Ask all once more: the caches serve what they have, or nothing; the answers don't change."""
    before, mapped = llm.engine.stats(), llm.pipeline.processed.num_hits
    outputs = llm.generate(prompts(), GREEDY)
    fixture.check(outputs)
    hits = llm.engine.stats().num_prefix_hits - before.num_prefix_hits
    assert hits == sum(output.num_cached_tokens for output in outputs)
    assert (hits > 0) == (llm.pipeline.processed.num_hits - mapped > 0) == is_cached(caches)


@pytest.fixture(params=CACHES)
def caches(request: pytest.FixtureRequest) -> str:
    """The name of one of `CACHES`."""
    name: str = request.param
    return name


def is_cached(caches: str) -> bool:
    return OPTIONS[caches].get("enable_prefix_caching", True)


def check_drafts(llm: LLM, caches: str) -> None:
    """Where drafts are on, some were right and some wrong."""
    stats = llm.engine.stats()
    if "num_speculative_tokens" in OPTIONS[caches]:
        assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    else:
        assert stats.num_drafts == 0


def prompts() -> list[Any]:
    """All cases, as `LLM.generate` takes them."""
    return [case.as_prompt() for case in CASES]


def num_images(cases: tuple[Case, ...]) -> int:
    """Different pictures in `cases`."""
    return len({id(image) for case in cases for image in case.images})


def test_each_prompt_alone(fixture: Fixture, caches: str) -> None:
    llm = fixture.llm(**OPTIONS[caches])
    trace = Trace.of(llm)
    fixture.check([llm.generate(prompt, GREEDY)[0] for prompt in prompts()])
    assert trace.most_sequences == 1
    check_drafts(llm, caches)


def test_all_prompts_in_one_batch(fixture: Fixture, caches: str) -> None:
    llm = fixture.llm(**OPTIONS[caches])
    trace = Trace.of(llm)
    fixture.check(llm.generate(prompts(), GREEDY))
    assert trace.most_sequences == len(CASES)
    assert llm.engine.stats().num_encodes == num_images(CASES)
    check_again(fixture, llm, caches)
    assert llm.engine.stats().num_encodes == num_images(CASES), "features are kept in either case"
    check_drafts(llm, caches)


def test_chunks_that_cut_through_images(fixture: Fixture, caches: str) -> None:
    options = {"max_num_batched_tokens": 11, "max_num_seqs": 4, "block_size": 4}
    llm = fixture.llm(**options, **OPTIONS[caches])
    trace = Trace.of(llm)
    fixture.check(llm.generate(prompts(), GREEDY))
    assert trace.cut_images > 0
    assert trace.mixed_steps > 0
    check_again(fixture, llm, caches)
    assert max(batch.num_tokens for batch in trace.steps) <= 11
    check_drafts(llm, caches)


def test_preemption_when_blocks_run_out(fixture: Fixture, caches: str) -> None:
    memory = _cache_bytes(fixture, num_tokens=200)
    llm = fixture.llm(block_size=4, kv_cache_memory=memory, **OPTIONS[caches])
    for _ in range(2):
        fixture.check(llm.generate(prompts(), GREEDY))
    stats = llm.engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_used_blocks == 0
    assert (llm.engine.kv_cache.num_evictions > 0) == is_cached(caches)
    check_drafts(llm, caches)


def test_preempted_chunks_and_sliced_images_beside_decodes(fixture: Fixture, caches: str) -> None:
    options = {"max_num_batched_tokens": 24, "block_size": 4}
    memory = _cache_bytes(fixture, num_tokens=200)
    llm = fixture.llm(kv_cache_memory=memory, **options, **OPTIONS[caches])
    # So short that each slice is one leaf, and never corrected: which steps there are is no matter
    # of the machine. Two decodes spare a draft of two tokens.
    llm.engine.scheduler.pace = Pace([(1, 1e-9), (64, 64e-9)], 2.0)
    llm.engine._clock = None
    trace = Trace.of(llm)
    for _ in range(2):
        fixture.check(llm.generate(prompts(), GREEDY))
    stats = llm.engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_used_blocks == 0
    assert trace.cut_images > 0
    assert trace.mixed_steps > 0
    assert trace.slices > 0
    check_drafts(llm, caches)


def test_neighbours_of_an_aborted_request(fixture: Fixture, caches: str) -> None:
    llm = fixture.llm(max_num_batched_tokens=32, **OPTIONS[caches])
    outputs: dict[str, RequestOutput] = {}
    for i, case in enumerate(CASES):
        prepared = llm.pipeline.prepare(
            PromptInputs(prompt=case.prompt, multi_modal_data={"image": case.images})
        )
        request = llm.pipeline.request(prepared, GREEDY, str(i))
        outputs[str(i)] = RequestOutput(str(i), prompt_token_ids=list(request.prompt_token_ids))
        llm.engine.add(request)
    while llm.engine.has_work:
        for output in llm.engine.step():
            outputs[output.request_id].extend(output)
        if outputs["1"].outputs and len(outputs["1"].outputs[0].token_ids) >= 5:
            llm.engine.abort("1")
    aborted = outputs["1"].outputs[0]
    assert aborted.finish_reason == "abort"
    assert aborted.token_ids == fixture.answers[1][: len(aborted.token_ids)]
    assert len(aborted.token_ids) < NUM_TOKENS
    kept = [i for i in range(len(CASES)) if i != 1]
    for i in kept:
        fixture.oracle.check(CASES[i], fixture.answers[i], outputs[str(i)].outputs[0].token_ids)
    assert llm.engine.stats().num_used_blocks == 0
    check_drafts(llm, caches)


def _cache_bytes(fixture: Fixture, num_tokens: int) -> int:
    """Bytes of a KV cache that holds `num_tokens` tokens in float32."""
    text = fixture.oracle.model.config.text_config
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return int(num_tokens * 2 * text.num_key_value_heads * head_dim * text.num_hidden_layers * 4)
