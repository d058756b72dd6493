"""A model shared out to several processes gives transformers' tokens, too.

`pytest --tensor-parallel-size 2 tests/test_parity*.py` runs all tests of parity so; here are some.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backbones import OTHER_BACKBONES
from checkpoints import BACKBONES, make_llava
from mm_engine import SamplingParams
from mm_engine.attention.backend import Attention
from parity import Oracle, Trace
from test_parity import CASES, Fixture, prompts

pytestmark = pytest.mark.usefixtures("forked_ranks")

NUM_TOKENS = 16
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
#: Backbones through transformers' modules: all of it shared out, the MLP only, nothing.
OTHERS = {"gemma2": True, "qwen3": True, "olmo2": False, "phi3": False}


@pytest.fixture(scope="module", params=[*BACKBONES, *OTHERS])
def fixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    """One checkpoint of each backbone."""
    path = make_llava(tmp_path_factory.mktemp("checkpoint"), backbone=request.param)
    oracle = Oracle(path)
    return Fixture(path, oracle, [oracle.answer(case, NUM_TOKENS) for case in CASES])


@pytest.mark.parametrize("size", [2, 4])
def test_chunks_that_cut_through_images(
    fixture: Fixture, size: int, request: pytest.FixtureRequest
) -> None:
    llm = fixture.llm(
        tensor_parallel_size=size, max_num_batched_tokens=11, max_num_seqs=4, block_size=4
    )
    trace = Trace.of(llm)
    fixture.check(llm.generate(prompts(), GREEDY))
    assert trace.cut_images > 0
    assert trace.mixed_steps > 0
    runner: Any = llm.engine.runner
    backbone = request.node.callspec.params["fixture"]
    heads = {layer.num_heads for layer in runner._runner.layers if isinstance(layer, Attention)}
    whole = fixture.oracle.model.config.text_config.num_attention_heads
    assert heads == {whole // size if OTHERS.get(backbone, True) else whole}


def test_preemption_and_steps_that_overlap(fixture: Fixture) -> None:
    llm = fixture.llm(
        tensor_parallel_size=2, block_size=4, kv_cache_memory=2**16, async_scheduling=True
    )
    fixture.check(llm.generate(prompts(), GREEDY))
    assert llm.engine.stats().num_used_blocks == 0


def test_every_other_backbone_is_covered_by_the_option() -> None:
    assert OTHERS.keys() <= OTHER_BACKBONES.keys()


@pytest.mark.parametrize(("quantization", "most"), [("int8", 0.15), ("fp8", 0.5)])
def test_pieces_are_quantised(tmp_path: Path, quantization: str, most: float) -> None:
    """Each by scales of its own: as near to the model's numbers as the whole is."""
    path = make_llava(tmp_path)
    oracle = Oracle(path)
    params = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True, logprobs=20)
    errors: dict[int, float] = {}
    for size in (1, 2):
        llm = Fixture(path, oracle, []).llm(tensor_parallel_size=size, quantization=quantization)
        errors[size] = 0.0
        for case, output in zip(CASES, llm.generate(prompts(), params), strict=True):
            expected = oracle.logits(case, [])[-1].log_softmax(-1)
            (got,) = output.outputs[0].logprobs
            far = [abs(entry.logprob - float(expected[token])) for token, entry in got.items()]
            errors[size] = max(errors[size], *far)
    assert 0 < errors[1] < most and 0 < errors[2] < most, errors
