"""Each row is sampled as its own request asks, whatever the other rows are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mm_engine_kernels.reference import cut_top
from torch import Tensor
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mm_engine.sequence import SampledToken, Sequence
from mm_engine.worker.sampler import Sampler
from sequences import make_sequence

VOCAB = 32


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 2


def tokens(sampled: list[SampledToken]) -> list[int]:
    assert all(token.error is None for token in sampled)
    return [token.token_id for token in sampled if token.token_id is not None]


def draw(logits: Tensor, num: int, **params: Any) -> Tensor:
    """How often each id is drawn from one row, by `num` requests with seeds 0, 1, 2, …"""
    sequences = [make_sequence(seed=seed, **params) for seed in range(num)]
    drawn = tokens(Sampler(0).sample(logits.expand(num, -1), sequences))
    return torch.bincount(torch.tensor(drawn), minlength=logits.shape[-1])


def assert_drawn_from(counts: Tensor, probs: Tensor) -> None:
    """Ids of no probability are never drawn, the others within 4.5 standard deviations."""
    num = counts.sum()
    assert not counts[probs == 0].any()
    spread = (num * probs * (1 - probs)).sqrt()
    assert ((counts - num * probs).abs() <= 4.5 * spread + 1).all()


def warped(logits: Tensor, *, temperature: float = 1.0, **params: Any) -> Tensor:
    """The distribution that transformers' warpers make of one row."""
    scores, ids = (logits / temperature)[None], torch.zeros(1, 1, dtype=torch.int64)
    if params.get("top_k", 0) > 0:
        scores = TopKLogitsWarper(params["top_k"])(ids, scores)
    if params.get("top_p", 1.0) < 1:
        scores = TopPLogitsWarper(params["top_p"])(ids, scores)
    if params.get("min_p", 0.0) > 0:
        scores = MinPLogitsWarper(params["min_p"])(ids, scores)
    return scores.softmax(-1)[0]


def test_greedy_takes_the_likeliest() -> None:
    logits = noise(5, VOCAB)
    sequences = [make_sequence(temperature=0.0) for _ in range(5)]
    assert tokens(Sampler(0).sample(logits, sequences)) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.3},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 5},
        {"top_k": 10_000},
        {"top_k": -1},
        {"top_p": 0.7},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 12, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=lambda p: "-".join(f"{k}{v}" for k, v in p.items()) or "plain",
)
def test_tokens_are_drawn_from_transformers_distribution(params: dict[str, Any]) -> None:
    row = noise(VOCAB, seed=3)
    probs = warped(row, **{**params, "top_k": min(params.get("top_k", 0), VOCAB)})
    assert_drawn_from(draw(row, 3000, **params), probs)


def test_one_request_draws_anew_at_each_step() -> None:
    row, sampler, sequence = noise(8, seed=1), Sampler(0), make_sequence(seed=5)
    drawn = [tokens(sampler.sample(row[None], [sequence]))[0] for _ in range(2000)]
    assert_drawn_from(torch.bincount(torch.tensor(drawn), minlength=8), row.softmax(-1))


def test_rows_of_one_step_keep_their_own_cuts() -> None:
    row = noise(VOCAB, seed=2)
    kinds: list[dict[str, Any]] = [{"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.5}, {}]
    num = 600
    sequences = [make_sequence(seed=seed, **kind) for seed in range(num) for kind in kinds]
    drawn = torch.tensor(tokens(Sampler(0).sample(row.expand(len(sequences), -1), sequences)))
    for i, kind in enumerate(kinds):
        counts = torch.bincount(drawn[i :: len(kinds)], minlength=VOCAB)
        assert_drawn_from(counts, warped(row, **kind))


@pytest.mark.parametrize("top_k", [1, 3, VOCAB])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 1.0])
def test_cuts_are_those_of_a_plain_loop(top_k: int, top_p: float) -> None:
    probs = noise(6, VOCAB, seed=4).softmax(-1)
    got = cut_top(probs, torch.full((6,), top_k), torch.full((6, 1), top_p))
    for row, cut in zip(probs, got, strict=True):
        ranked = row.argsort(descending=True, stable=True)[:top_k].tolist()
        total, mass, kept = float(row[ranked].sum()), 0.0, set[int]()
        for token in ranked:
            if kept and mass >= top_p * total:
                break
            kept.add(token)
            mass += float(row[token])
        assert set(cut.nonzero().flatten().tolist()) == kept
        assert torch.equal(cut[list(kept)], row[list(kept)])


def test_ties_of_a_cut_go_to_the_lower_id() -> None:
    cut = cut_top(torch.full((1, 4), 0.25), torch.tensor([2]), torch.ones(1, 1))
    assert cut.tolist() == [[0.25, 0.25, 0.0, 0.0]]


@pytest.mark.parametrize(("uniform", "picked"), [(0.0, 2), (1.0 - 2**-53, 4)], ids=["low", "high"])
def test_the_outermost_draws_take_no_id_that_was_cut(
    uniform: float, picked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too rare to be waited for, so the draw is set."""
    monkeypatch.setattr(
        torch, "rand", lambda *_, **options: torch.tensor([uniform], dtype=options["dtype"])
    )
    row = torch.tensor([0.0, 0.0, 5.0, 5.0, 5.0, 0.0, 0.0])
    assert tokens(Sampler(0).sample(row[None], [make_sequence(top_k=3)])) == [picked]


def run_alone(sequence: Sequence, steps: list[Tensor], sampler: Sampler) -> list[int]:
    for logits in steps:
        sequence.token_ids.append(tokens(sampler.sample(logits[None], [sequence]))[0])
    return sequence.output_token_ids


def test_a_seeded_request_does_not_depend_on_its_neighbours() -> None:
    steps = list(noise(12, VOCAB, seed=5))
    params: dict[str, Any] = {"seed": 11, "top_p": 0.95, "repetition_penalty": 1.2}
    alone = run_alone(make_sequence(**params), steps, Sampler(0))
    assert run_alone(make_sequence(**params), steps, Sampler(9)) == alone
    assert run_alone(make_sequence(**{**params, "seed": 12}), steps, Sampler(0)) != alone

    sampler, sequence = Sampler(1), make_sequence(**params)
    others = [
        make_sequence(temperature=2.0, top_k=3),
        make_sequence(temperature=0.0, logprobs=2),
        make_sequence(seed=11, presence_penalty=1.0, logit_bias={3: 50.0}),
    ]
    for i, logits in enumerate(steps):
        batch = [*others[: i % 4], sequence, *others[i % 4 :]]  # its row moves about
        rows = torch.stack([logits if s is sequence else noise(VOCAB, seed=i) for s in batch])
        for each, token in zip(batch, sampler.sample(rows, batch), strict=True):
            assert token.token_id is not None
            each.token_ids.append(token.token_id)
    assert sequence.output_token_ids == alone


def test_completions_of_a_seeded_request_differ_as_if_seeded_one_apart() -> None:
    steps = list(torch.zeros(12, VOCAB))
    first, second = (run_alone(make_sequence(seed=3, index=i), steps, Sampler(0)) for i in range(2))
    assert first != second
    assert second == run_alone(make_sequence(seed=4), steps, Sampler(0))


def test_no_two_unseeded_sequences_draw_alike() -> None:
    """Neither completions of one request nor those of the next."""
    sampler, flat = Sampler(0), torch.zeros(10, 10_000)
    rows = [make_sequence(index=index) for n in (2, 1, 4, 3) for index in range(n)]
    assert len(set(tokens(sampler.sample(flat, rows)))) == 10


def test_unseeded_sequences_follow_the_engines_seed() -> None:
    steps = list(torch.zeros(8, VOCAB))
    runs = [run_alone(make_sequence(), steps, Sampler(seed)) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def adjusted(row: Tensor, sequence: Sequence) -> Tensor:
    return Sampler(0)._adjust(row[None], [sequence])[0]


def test_presence_and_frequency_are_openais_formula_over_the_output() -> None:
    row = noise(VOCAB)
    sequence = make_sequence((1, 2), (4, 5, 4, 4), presence_penalty=0.5, frequency_penalty=0.25)
    expected = row.clone()
    expected[4] -= 0.5 + 3 * 0.25
    expected[5] -= 0.5 + 0.25
    torch.testing.assert_close(adjusted(row, sequence), expected)


@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetition_is_transformers_over_prompt_and_output(penalty: float) -> None:
    row, prompt, output = noise(VOCAB), (1, 2, 2, 9), (4, 5, 4)
    got = adjusted(row, make_sequence(prompt, output, repetition_penalty=penalty))
    ids = torch.tensor([[*prompt, *output]])
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, row[None].clone())[0]
    assert not torch.equal(expected, row)
    torch.testing.assert_close(got, expected)


def test_penalties_count_each_output_token_once_over_many_steps() -> None:
    sampler, sequence = Sampler(0), make_sequence((9,), (), frequency_penalty=0.5)
    for output in ([], [3], [3, 3], [3, 3, 7], [3, 3, 7, 3]):
        sequence.token_ids = [9, *output]
        row = torch.zeros(VOCAB)
        row = sampler._adjust(row[None], [sequence])[0]
        counts = torch.bincount(torch.tensor(output, dtype=torch.int64), minlength=VOCAB)
        torch.testing.assert_close(row, -0.5 * counts)


def test_bias_decides_and_may_ban() -> None:
    row = noise(VOCAB)
    best = int(row.argmax())
    sequences = [
        make_sequence(temperature=0.0, logit_bias={7: 100}),
        make_sequence(temperature=0.0, logit_bias={best: -100.0}),
        make_sequence(temperature=0.0),
    ]
    chosen = tokens(Sampler(0).sample(row.expand(3, -1), sequences))
    assert chosen == [7, int(row.argsort(descending=True)[1]), best]
    torch.testing.assert_close(
        adjusted(row, make_sequence(logit_bias={3: 1.5, 4: -2})),
        row + torch.eye(VOCAB)[3] * 1.5 - torch.eye(VOCAB)[4] * 2,
    )


def test_min_tokens_bans_every_end_until_it_is_reached() -> None:
    row = torch.zeros(VOCAB)
    row[[2, 3, 9]] = torch.tensor([9.0, 8.0, 7.0])
    ends: dict[str, Any] = {
        "eos": (2, 10_000),  # a tokenizer's id past the model's vocabulary
        "stop_token_ids": (3,),
        "min_tokens": 2,
        "temperature": 0.0,
    }
    for output, expected in (((), 9), ((5,), 9), ((5, 6), 2)):
        sequence = make_sequence((1,), output, **ends)
        assert tokens(Sampler(0).sample(row[None], [sequence])) == [expected]
    drawn = draw(row, 300, eos=(2,), stop_token_ids=(3,), min_tokens=1)
    assert drawn[9] > 0 and not drawn[[2, 3]].any()


def test_logprobs_are_the_models_own_before_any_change() -> None:
    row = noise(VOCAB)
    reference, ranked = row.log_softmax(-1), row.argsort(descending=True).tolist()
    changed: dict[str, Any] = {"temperature": 0.0, "logit_bias": {ranked[4]: 100.0}}
    (token,) = Sampler(0).sample(row[None], [make_sequence(logprobs=3, **changed)])
    assert token.token_id == ranked[4] and token.rank == 5
    assert token.logprob == pytest.approx(float(reference[ranked[4]]))
    assert token.top_logprobs is not None
    assert [id_ for id_, _ in token.top_logprobs] == ranked[:3]
    assert [p for _, p in token.top_logprobs] == pytest.approx(reference[ranked[:3]].tolist())


def test_each_row_reports_as_many_logprobs_as_it_asked_for() -> None:
    wanted = [None, 0, 5, 1, 20]
    sequences = [make_sequence(temperature=0.0, logprobs=num) for num in wanted]
    sampled = Sampler(0).sample(noise(5, 8), sequences)
    for num, token in zip(wanted, sampled, strict=True):
        if num is None:
            assert token.logprob is token.rank is token.top_logprobs is None
        else:
            assert token.top_logprobs is not None
            assert len(token.top_logprobs) == min(num, 8)  # of 8 ids there are no 20
            assert token.rank == 1


def test_logits_are_left_as_they_are() -> None:
    logits = noise(2, VOCAB)
    before = logits.clone()
    sequence = make_sequence((1,), (4,), presence_penalty=1.0, logit_bias={3: 5}, min_tokens=3)
    Sampler(0).sample(logits, [sequence, make_sequence(top_k=3)])
    assert torch.equal(logits, before)
