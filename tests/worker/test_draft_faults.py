"""What only a draft makes go wrong on the device: the request goes on as if it had had none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import IMAGE_SIZE
from mm_engine.sequence import SampledToken, ScheduledBatch, ScheduledSequence, Sequence
from mm_engine.worker.model_runner import ModelRunner
from poisoned import NUM_BLOCKS, POISON, make_poisoned
from sequences import make_item, make_sequence

PROMPT = (1, 50, 51, 52, 53)


@pytest.fixture(scope="module", params=["llama", "mistral"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A model with and without a sliding window, whose token 77 is NaN."""
    return make_poisoned(tmp_path_factory.mktemp("model"), request.param)


@pytest.fixture(autouse=True)
def fresh(runner: ModelRunner) -> None:
    """No block of another test."""
    runner.init_cache(NUM_BLOCKS)


def start(runner: ModelRunner, num: int = 2, **params: Any) -> list[Sequence]:
    """Sequences that have answered one token."""
    blocks: Iterator[int] = iter(range(NUM_BLOCKS))
    sequences = [
        make_sequence((*PROMPT, 60 + i), **{"temperature": 0.0, **params}) for i in range(num)
    ]
    for sequence in sequences:
        sequence.block_table = [next(blocks) for _ in range(6)]
    step(runner, sequences)
    return sequences


def step(
    runner: ModelRunner, sequences: list[Sequence], drafts: list[list[int]] | None = None
) -> list[SampledToken]:
    """Run one step and append, as the engine would."""
    shares = [
        ScheduledSequence(s, s.num_uncomputed_tokens, tuple(draft))
        for s, draft in zip(sequences, drafts or [[]] * len(sequences), strict=True)
    ]
    sampled = runner.run(ScheduledBatch(tuple(shares))).tokens
    for share, last in zip(shares, sampled, strict=True):
        if last.error is None:
            share.sequence.num_computed_tokens += share.num_new_tokens + len(last.accepted)
            for token in (*last.accepted, last):
                assert token.token_id is not None
                share.sequence.token_ids.append(token.token_id)
    return sampled


def answers(runner: ModelRunner, **params: Any) -> list[list[int]]:
    """What two sequences answer without drafts."""
    sequences = start(runner, **params)
    for _ in range(6):
        step(runner, sequences)
    return [sequence.output_token_ids for sequence in sequences]


SAMPLING = [{}, {"temperature": 1.0, "seed": 4, "frequency_penalty": 0.5}]


@pytest.mark.parametrize("params", SAMPLING, ids=["greedy", "random"])
def test_right_drafts_are_taken_and_wrong_ones_left(
    runner: ModelRunner, params: dict[str, Any]
) -> None:
    expected = answers(runner, **params)
    runner.init_cache(NUM_BLOCKS)
    sequences = start(runner, **params)
    wrong = (expected[1][2] + 1) % 70
    drafts = [expected[0][1:4], [expected[1][1], wrong, expected[1][3]]]
    sampled = step(runner, sequences, drafts)
    assert [len(token.accepted) for token in sampled] == [3, 1]
    for _ in range(4):
        step(runner, sequences)
    assert [s.output_token_ids[:7] for s in sequences] == [expected[0], expected[1]]


@pytest.mark.parametrize("params", SAMPLING, ids=["greedy", "random"])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_nan_in_a_draft_fails_nobody_and_stays_in_no_block(
    runner: ModelRunner, place: int, params: dict[str, Any]
) -> None:
    expected = answers(runner, **params)
    runner.init_cache(NUM_BLOCKS)
    sequences = start(runner, **params)
    sick = expected[0][1:4]
    sick[place] = POISON
    sampled = step(runner, sequences, [sick, expected[1][1:4]])
    assert [token.error for token in sampled] == [None, None]
    assert [len(token.accepted) for token in sampled] == [0, 3], "the neighbour keeps its draft"
    for keys, values in runner.kv_caches:
        assert keys.isfinite().all() and values.isfinite().all()
    for _ in range(5):
        step(runner, sequences)
    assert sequences[0].output_token_ids == expected[0]
    assert sequences[1].output_token_ids[:7] == expected[1]


def test_nan_in_a_known_token_fails_the_request_with_a_draft_too(runner: ModelRunner) -> None:
    sequences = start(runner)
    sequences[0].token_ids[-1] = POISON
    sampled = step(runner, sequences, [[5, 6], [5, 6]])
    assert sampled[0].error is not None and "NaN" in sampled[0].error.message
    assert sampled[1].error is None
    for keys, values in runner.kv_caches:
        assert keys.isfinite().all() and values.isfinite().all()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_logits_that_only_a_draft_spoils_fail_nobody(
    runner: ModelRunner, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(runner)
    runner.init_cache(NUM_BLOCKS)
    sequences = start(runner)
    compute_logits = runner.model.compute_logits

    def spoiled(hidden: Tensor) -> Tensor:
        logits: Tensor = compute_logits(hidden)
        if len(logits) == 8:  # of the draft's last token
            logits[3] = float(value)
        return logits

    monkeypatch.setattr(runner.model, "compute_logits", spoiled)
    sampled = step(runner, sequences, [answer[1:4] for answer in expected])
    assert [token.error for token in sampled] == [None, None]
    assert [len(token.accepted) for token in sampled] == [0, 3]
    for _ in range(5):
        step(runner, sequences)
    assert [s.output_token_ids[:7] for s in sequences] == expected
    assert all(torch.isfinite(cache).all() for pair in runner.kv_caches for cache in pair)


def test_what_is_evicted_and_encoded_in_one_step_is_encoded_once(runner: ModelRunner) -> None:
    """The step is computed again without its draft, whose NaN may be at fault."""
    (sequence,) = start(runner, 1)
    item = make_item("a", 2, 16, pixel_values=torch.zeros(3, IMAGE_SIZE, IMAGE_SIZE))
    share = ScheduledSequence(sequence, sequence.num_uncomputed_tokens, (POISON,))
    before = runner.encoder.num_encoded
    runner.run(ScheduledBatch((share,), encode=(item,), evict=("a",)))
    assert runner.encoder.num_encoded == before + 1
