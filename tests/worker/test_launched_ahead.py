"""A step may be launched before the one before it has told what it sampled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mm_engine.sequence import (
    UNKNOWN_TOKEN,
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
)
from mm_engine.worker.launched import LaunchedStep
from mm_engine.worker.model_runner import ModelRunner
from poisoned import NUM_BLOCKS, POISON, make_poisoned
from sequences import make_item, make_sequence

PROMPT = (1, 9, 20, 31)
PARAMS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 1.0, "seed": 4, "top_k": 20, "top_p": 0.9},
    "penalties": {"temperature": 1.0, "seed": 4, "frequency_penalty": 1.5, "logprobs": 2},
    "repetition": {"temperature": 0.0, "repetition_penalty": 1.7, "min_tokens": 3},
}


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A float32 model whose token 77 is NaN."""
    return make_poisoned(tmp_path_factory.mktemp("model"), "llama")


@pytest.fixture(autouse=True)
def fresh(runner: ModelRunner) -> None:
    runner.init_cache(NUM_BLOCKS)


def make(num: int = 3, **params: Any) -> list[Sequence]:
    blocks = iter(range(NUM_BLOCKS))
    sequences = [make_sequence((*PROMPT, 60 + i), **params) for i in range(num)]
    for sequence in sequences:
        sequence.block_table = [next(blocks) for _ in range(6)]
    return sequences


def launch(runner: ModelRunner, sequences: list[Sequence]) -> LaunchedStep:
    """Launch a step of all, and count what it computes and samples as if it were known."""
    shares = tuple(ScheduledSequence(s, s.num_uncomputed_tokens) for s in sequences)
    launched = runner.launch(ScheduledBatch(shares))
    for share in shares:
        share.sequence.num_computed_tokens += share.num_new_tokens
        share.sequence.token_ids.append(UNKNOWN_TOKEN)
    return launched


def tell(sequences: list[Sequence], sampled: list[SampledToken]) -> None:
    """Put what a step has told in the place of the first token that isn't known."""
    for sequence, token in zip(sequences, sampled, strict=True):
        assert token.token_id is not None
        sequence.token_ids[sequence.token_ids.index(UNKNOWN_TOKEN)] = token.token_id


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_tokens_are_those_of_steps_one_by_one(runner: ModelRunner, params: dict[str, Any]) -> None:
    told: list[list[SampledToken]] = []
    sequences = make(**params)
    for _ in range(6):
        told.append(launch(runner, sequences).result().tokens)
        tell(sequences, told[-1])
    runner.init_cache(NUM_BLOCKS)
    ahead, pending = make(**params), None
    got: list[list[SampledToken]] = []
    for _ in range(6):
        launched = launch(runner, ahead)
        if pending is not None:
            assert all(s.token_ids[-2:] == [UNKNOWN_TOKEN] * 2 for s in ahead), "not ahead"
            got.append(pending.result().tokens)
            tell(ahead, got[-1])
        pending = launched
    assert pending is not None
    got.append(pending.result().tokens)
    assert got == told
    assert len({token.token_id for tokens in told for token in tokens}) > 3


def test_what_a_launch_finds_out_is_known_before_the_result(runner: ModelRunner) -> None:
    bad = make_item("bad", 1, 3, pixel_values=torch.zeros(2))
    with_image = make_sequence((1, 0, 0, 0, 5), items=(bad,))
    with_image.block_table = [30, 31]
    healthy = make(1, temperature=0.0)
    assert not launch(runner, healthy).failed
    runner.init_cache(NUM_BLOCKS)
    for sequences in ([with_image], [*make(1), with_image]):
        shares = tuple(ScheduledSequence(s, s.num_uncomputed_tokens) for s in sequences)
        launched = runner.launch(ScheduledBatch(shares, encode=(bad,)))
        assert launched.failed
        errors = [token.error is not None for token in launched.result().tokens]
        assert errors == [False, True][-len(sequences) :]
    assert not runner.launch(ScheduledBatch((), evict=("bad",))).failed


def test_what_follows_a_sick_step_is_sick_too_and_stays_in_no_block(runner: ModelRunner) -> None:
    sequences = make(temperature=0.0)
    sequences[1].token_ids[-1] = POISON
    first = launch(runner, sequences)
    second = launch(runner, sequences)
    results = [first.result().tokens, second.result().tokens]
    for tokens in results:
        assert [token.error is None for token in tokens] == [True, False, True]
        assert tokens[1].error is not None and "forward" in tokens[1].error.message
    for keys, values in runner.kv_caches:
        assert keys.isfinite().all() and values.isfinite().all()
    runner.init_cache(NUM_BLOCKS)
    healthy = make(temperature=0.0)
    for number in range(2):
        sampled = launch(runner, healthy).result().tokens
        tell(healthy, sampled)
        for i in (0, 2):
            assert sampled[i] == results[number][i]
