"""NaN in one request of the real model: its neighbours share its beginning, with all caches on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints import make_llava
from mm_engine import LLM, SamplingParams
from mm_engine.outputs import RequestOutput
from parity import picture

GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
POISON = 77  # the token whose embedding is NaN
BLOCK_SIZE = 4
BEFORE = [5, 9, 13, 6]  # after the image, before what differs: shared


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("checkpoint"))


def start(checkpoint: Path, *, poisoned: bool = True) -> LLM:
    llm = LLM(str(checkpoint), dtype="float32", block_size=BLOCK_SIZE, progress=False)
    if poisoned:
        runner: Any = llm.engine.runner._runner
        runner.model.language_model.embedding.weight.data[POISON] = float("nan")
    return llm


def prompt(llm: LLM, ids: list[int]) -> Any:
    return {
        "prompt_token_ids": [1, llm.pipeline._placeholder, *BEFORE, *ids],
        "multi_modal_data": {"image": picture(1)},
    }


def tokens(output: RequestOutput) -> list[int]:
    assert output.error is None
    return output.outputs[0].token_ids


@pytest.mark.parametrize("place", [0, 1, 7], ids=lambda n: f"after {n} tokens")
def test_nan_in_one_row_costs_that_request_and_is_found_by_nobody(
    checkpoint: Path, place: int
) -> None:
    llm = start(checkpoint)
    healthy = [[20, 21, 22, 23, 24], [30, 31]]
    sick = [*range(40, 40 + place), POISON, *range(60, 69)]
    wanted = [tokens(start(checkpoint).generate(prompt(llm, ids), GREEDY)[0]) for ids in healthy]
    prompts = [prompt(llm, ids) for ids in (healthy[0], sick, healthy[1])]
    first, failed, second = llm.generate(prompts, GREEDY)
    assert [tokens(first), tokens(second)] == wanted
    assert failed.finished and failed.error is not None
    assert failed.error.name == "PluginError" and "NaN" in failed.error.message
    assert second.num_cached_tokens > 0 and llm.pipeline.processed.num_hits > 0  # the controls

    runner: Any = llm.engine.runner._runner
    kept = list(llm.engine.kv_cache._block_of_key.values())
    for keys, values in runner.kv_caches:
        assert keys.isfinite().all() and values.isfinite().all()
        assert all(keys[block].any() for block in kept)
    (again,) = llm.generate(prompt(llm, sick), GREEDY)
    assert again.error == failed.error
    # What the neighbours computed is there: up to the last whole block before what differs.
    shared = len(again.prompt_token_ids) - len(sick)
    assert again.num_cached_tokens == shared // BLOCK_SIZE * BLOCK_SIZE

    # Whoever gets the blocks that it had, or asks the same of a model that is sound.
    assert [tokens(o) for o in llm.generate([prompt(llm, i) for i in healthy], GREEDY)] == wanted
    embedding = runner.model.language_model.embedding.weight.data
    embedding[POISON] = embedding[POISON - 1]
    sound = start(checkpoint)
    other: Any = sound.engine.runner._runner
    other.model.language_model.embedding.weight.data[POISON] = embedding[POISON - 1]
    got, expected = (tokens(e.generate(prompt(e, sick), GREEDY)[0]) for e in (llm, sound))
    assert got == expected

    engine = llm.engine
    assert not engine.has_work and not engine._answers
    assert engine.kv_cache.num_free_blocks == engine.kv_cache.num_blocks
    assert not engine.encoder_cache._num_pins and not engine.encoder_cache._pinned_by
    assert engine.encoder_cache._rows.keys() == runner.encoder.features.keys()
