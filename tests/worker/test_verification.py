"""A draft decides how many tokens a step brings, and never which: sampled as one at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_engine.sequence import SampledToken, ScheduledSequence, Sequence
from mm_engine.worker.sampler import Sampler
from mm_engine.worker.verification import launch_shares
from sequences import make_sequence

VOCAB = 24
INF = float("inf")
EOS, STOP = 2, 3

params = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 2**40),
        "temperature": st.sampled_from([0.0, 0.2, 1.0, 5.0]),
        "top_k": st.sampled_from([0, 1, 3]),
        "top_p": st.sampled_from([0.5, 0.95]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "presence_penalty": st.sampled_from([-2.0, 1.0]),
        "frequency_penalty": st.sampled_from([-1.0, 2.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.5]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9), max_size=3),
        "logprobs": st.sampled_from([0, 3]),
        "min_tokens": st.sampled_from([3, 7]),
        "index": st.integers(0, 3),
    },
)


def logits_behind(ids: list[int]) -> Tensor:
    """The pretended model: logits that depend on all tokens before."""
    generator = torch.Generator().manual_seed(hash(tuple(ids)) % 2**62)
    row = torch.randn(VOCAB, generator=generator) * 3
    row[int(torch.randint(VOCAB, (1,), generator=generator))] = -INF
    return row


def make(options: dict[str, Any]) -> Sequence:
    return make_sequence((1, 5, 6, 5), eos=(EOS,), stop_token_ids=(STOP,), **options)


def run_step(
    sampler: Sampler, sequences: list[Sequence], drafts: list[list[int]]
) -> list[SampledToken]:
    """One step of sequences with their drafts, as the runner and the engine make it."""
    shares, rows = [], []
    for sequence, draft in zip(sequences, drafts, strict=True):
        shares.append(ScheduledSequence(sequence, 1, tuple(draft)))
        rows += [logits_behind(sequence.token_ids + draft[:num]) for num in range(len(draft) + 1)]
    sampled = launch_shares(sampler, torch.stack(rows), shares).tokens()
    for sequence, last in zip(sequences, sampled, strict=True):
        for token in (*last.accepted, last):
            assert token.token_id is not None
            sequence.token_ids.append(token.token_id)
    return sampled


def told(token: SampledToken) -> tuple[Any, ...]:
    top = [(i, pytest.approx(p, abs=1e-5)) for i, p in token.top_logprobs or ()]
    logprob = None if token.logprob is None else pytest.approx(token.logprob, abs=1e-5)
    return token.token_id, token.rank, logprob, top


@settings(max_examples=80)
@given(st.lists(params, min_size=1, max_size=4), st.randoms(use_true_random=False))
def test_tokens_and_logprobs_are_those_of_a_step_for_each(
    options: list[dict[str, Any]], rng: random.Random
) -> None:
    num_tokens = 12
    one_by_one, sampler = [make(given) for given in options], Sampler(3)
    expected = [run_step(sampler, one_by_one, [[]] * len(options)) for _ in range(num_tokens)]
    sequences, sampler = [make(given) for given in options], Sampler(3)
    got: list[list[SampledToken]] = [[] for _ in options]
    num_right = num_wrong = 0
    while any(len(tokens) < num_tokens for tokens in got):
        going = [i for i, tokens in enumerate(got) if len(tokens) < num_tokens]
        drafts = []
        for i in going:
            known = len(got[i])
            right = one_by_one[i].output_token_ids[known : known + rng.randint(0, 4)]
            right = right[: num_tokens - known - 1]
            drafts.append([t if rng.random() < 0.8 else rng.randrange(VOCAB) for t in right])
        sampled = run_step(sampler, [sequences[i] for i in going], drafts)
        for i, draft, last in zip(going, drafts, sampled, strict=True):
            got[i] += (*last.accepted, last)
            num_right += len(last.accepted)
            num_wrong += len(draft) - len(last.accepted)
    event(f"right: {num_right > 0}, wrong: {num_wrong > 0}")
    for i, sequence in enumerate(sequences):
        assert sequence.token_ids == one_by_one[i].token_ids
        assert [told(token) for token in got[i]] == [told(step[i]) for step in expected]


def test_what_is_drawn_with_a_draft_has_the_models_distribution() -> None:
    """Two tokens of 6,000 unseeded requests, whose drafts all guess the likeliest first token."""
    num, sampler = 6000, Sampler(0)
    sequences = [make_sequence((1,), temperature=1.0) for _ in range(num)]

    def probs(ids: list[int]) -> Tensor:
        return logits_behind(ids)[:5].softmax(-1)

    first = probs([1])
    guess = int(first.argmax())
    rows = torch.cat([logits_behind([1])[None, :5], logits_behind([1, guess])[None, :5]])
    shares = [ScheduledSequence(sequence, 1, (guess,)) for sequence in sequences]
    sampled = launch_shares(sampler, rows.repeat(num, 1), shares).tokens()
    accepted = [token for token in sampled if token.accepted]
    assert all(token.accepted[0].token_id == guess for token in accepted)
    expected = torch.cat([first, probs([1, guess]) * first[guess]])
    expected[guess] = 0.0  # never the last of a step: another token follows
    counts = torch.zeros(10)
    for token in sampled:
        assert token.token_id is not None
        counts[token.token_id + 5 * bool(token.accepted)] += 1
    assert not counts[expected == 0].any()
    spread = (num * expected * (1 - expected)).sqrt()
    assert ((counts - num * expected).abs() <= 4.5 * spread + 1).all()


@pytest.mark.parametrize("seed", [None, 11])
def test_a_fault_between_two_tokens_of_a_draft_moves_nothing(
    seed: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The step may be repeated, without the draft too, and must bring the same tokens."""
    options = {"temperature": 1.0, "frequency_penalty": 0.5, "seed": seed}
    sampler, sequences = Sampler(5), [make(options), make(options)]
    other, others = Sampler(5), [make(options), make(options)]
    run_step(sampler, sequences[:1], [[]])  # the second one's first draw is in the faulty step
    run_step(other, others[:1], [[]])
    expected = [run_step(other, others, [[], []]) for _ in range(4)]
    draft = [[step[i].token_id for step in expected[:3]] for i in range(2)]
    sample, num_calls = Sampler.sample, 0

    def fails_at_third(self: Sampler, *args: Any) -> list[SampledToken]:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 3:
            raise torch.OutOfMemoryError("no memory")
        return sample(self, *args)

    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "sample", fails_at_third)
        with pytest.raises(torch.OutOfMemoryError):
            run_step(sampler, sequences, draft)  # type: ignore[arg-type]
    assert num_calls == 3
    again = run_step(sampler, sequences[:1], [[]]) + run_step(sampler, sequences[1:], [[]])
    assert [t.token_id for t in again] == [t.token_id for t in expected[0]]
    for step in expected[1:]:
        got = run_step(sampler, sequences, [[], []])
        assert [t.token_id for t in got] == [t.token_id for t in step]


def test_greedy_rows_are_compared_position_by_position() -> None:
    sequence = make_sequence((1,), temperature=0.0)
    rows = torch.eye(6)[[3, 4, 5, 1]]
    for draft, tokens in (
        ([3, 4, 5], [3, 4, 5, 1]),
        ([3, 4, 0], [3, 4, 5]),
        ([3, 0, 5], [3, 4]),
        ([0, 4, 5], [3]),
    ):
        share = ScheduledSequence(sequence, 1, tuple(draft))
        (last,) = launch_shares(Sampler(0), rows, [share]).tokens()
        assert [t.token_id for t in (*last.accepted, last)] == tokens


def test_min_tokens_counts_the_accepted_ones() -> None:
    sequence = make_sequence((1,), (9,), temperature=0.0, min_tokens=3, eos=(EOS,))
    rows = torch.zeros(3, VOCAB)
    rows[:, EOS], rows[:, 4] = 5.0, 3.0  # the end is the likeliest everywhere
    share = ScheduledSequence(sequence, 1, (4, 4))
    (last,) = launch_shares(Sampler(0), rows, [share]).tokens()
    assert [t.token_id for t in (*last.accepted, last)] == [4, 4, EOS]


def test_penalties_count_the_accepted_ones() -> None:
    sequence = make_sequence((1,), (9,), temperature=0.0, frequency_penalty=2.0)
    rows = torch.zeros(3, VOCAB)
    rows[:, 4], rows[:, 5], rows[:, 6] = 9.0, 8.0, 6.5  # each one that was said falls by 2
    share = ScheduledSequence(sequence, 1, (4, 5))
    (last,) = launch_shares(Sampler(0), rows, [share]).tokens()
    assert [t.token_id for t in (*last.accepted, last)] == [4, 5, 4]
