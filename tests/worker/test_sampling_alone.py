"""A request's tokens are its own: not its neighbours' affair, nor that of preemption."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mm_engine import LLM, SamplingParams
from mm_engine.sequence import SampledToken, Sequence
from mm_engine.worker.sampler import Sampler
from sequences import make_sequence

VOCAB = 40
INF = float("inf")

params = st.fixed_dictionaries(
    {"seed": st.integers(-(2**40), 2**40)},
    optional={
        "temperature": st.sampled_from([0.0, 0.2, 1.0, 5.0]),
        "top_k": st.sampled_from([-1, 0, 1, 3, 1000]),
        "top_p": st.sampled_from([1e-3, 0.5, 0.95, 1.0]),
        "min_p": st.sampled_from([0.0, 0.1, 1.0]),
        "presence_penalty": st.sampled_from([-2.0, 0.0, 1.0]),
        "frequency_penalty": st.sampled_from([-1.0, 0.0, 2.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.0, 1.5]),
        "logit_bias": st.dictionaries(st.integers(0, VOCAB - 1), st.floats(-9, 9), max_size=3),
        "logprobs": st.sampled_from([None, 0, 3]),
        "min_tokens": st.sampled_from([0, 2, 9]),
        "index": st.integers(0, 3),
    },
)
requests = st.tuples(
    params,
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6).map(tuple),  # prompt
    st.integers(0, 2**31),  # where its logits come from
)


def logits_of(seed: int, step: int) -> Tensor:
    """Logits as of a model: some tokens far ahead, some ruled out."""
    generator = torch.Generator().manual_seed(seed + step)
    row = torch.randn(VOCAB, generator=generator) * 3
    row[int(torch.randint(VOCAB, (1,), generator=generator))] = -INF
    return row


def make(request: tuple[dict[str, Any], tuple[int, ...], int]) -> Sequence:
    options, prompt, _ = request
    return make_sequence(prompt, eos=(2,), stop_token_ids=(3,), **options)


def run(sampler: Sampler, batch: list[Any], step: int) -> list[SampledToken]:
    rows = torch.stack([logits_of(seed, step) for _, seed in batch])
    sampled = sampler.sample(rows, [sequence for sequence, _ in batch])
    for (sequence, _), token in zip(batch, sampled, strict=True):
        assert token.error is None and token.token_id is not None
        sequence.token_ids.append(token.token_id)
    return sampled


@settings(max_examples=60)
@given(st.lists(requests, min_size=2, max_size=6), st.randoms(use_true_random=False))
def test_a_seeded_request_is_sampled_alone_as_among_any_others(
    given_requests: list[Any], random: Any
) -> None:
    num_steps = 4
    alone = []
    for request in given_requests:
        sequence, sampler = make(request), Sampler(0)
        alone.append([run(sampler, [(sequence, request[2])], i)[0] for i in range(num_steps)])
    sampler = Sampler(7)
    together = [(make(request), request[2]) for request in given_requests]
    for step in range(num_steps):
        order = list(range(len(together)))
        random.shuffle(order)
        sampled = run(sampler, [together[i] for i in order], step)
        for place, i in enumerate(order):
            expected, got = alone[i][step], sampled[place]
            assert got.token_id == expected.token_id
            assert got.rank == expected.rank
            assert got.logprob == pytest.approx(expected.logprob)


@settings(max_examples=100)
@given(requests)
def test_what_was_ruled_out_is_never_drawn(request: Any) -> None:
    sequence, row = make(request), logits_of(request[2], 0)
    (token,) = Sampler(0).sample(row[None], [sequence])
    assert token.token_id is not None
    assert row[token.token_id] > -INF
    if sequence.request.sampling_params.min_tokens:
        assert token.token_id not in (2, 3)


def test_seeds_next_to_each_other_draw_as_if_independent() -> None:
    """Completions of one request have seeds one apart: their first draws must not move together."""
    num = 4000
    sequences = [make_sequence(seed=seed) for seed in range(num)]
    rows = torch.zeros(1, 16).expand(num, -1)
    drawn = torch.tensor([t.token_id for t in Sampler(0).sample(rows, sequences)])
    pairs = torch.bincount(drawn[:-1] * 16 + drawn[1:], minlength=256).double()
    expected = (num - 1) / 256
    chi_square = float(((pairs - expected) ** 2 / expected).sum())
    # 255 degrees of freedom: mean 255, standard deviation 22.6.
    assert chi_square < 255 + 5 * 22.6


def test_preempted_requests_draw_what_they_would_have_drawn(llava: Path) -> None:
    prompts = ["Hello there, what is in", "How many objects are", "x", "Describe the image."]
    sampling = [
        SamplingParams(temperature=1.0, seed=5, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=1.5, top_p=0.9, seed=6, max_tokens=40, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=7, frequency_penalty=1.0, max_tokens=40, n=2),
        SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=40, ignore_eos=True),
    ]
    block = 4 * 2 * 2 * 16 * 2 * 4  # tokens, keys and values, heads, head size, layers, float32
    options: dict[str, Any] = {"dtype": "float32", "block_size": 4, "progress": False}
    roomy = LLM(str(llava), **options)
    tight = LLM(str(llava), kv_cache_memory=24 * block, **options)
    expected, got = (llm.generate(prompts, sampling) for llm in (roomy, tight))
    assert roomy.engine.stats().num_preemptions == 0
    assert tight.engine.stats().num_preemptions > 0
    for first, second in zip(expected, got, strict=True):
        assert [o.token_ids for o in first.outputs] == [o.token_ids for o in second.outputs]
