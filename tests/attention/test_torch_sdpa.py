"""The PyTorch backend gives what the plain meaning of paged attention gives, in few calls."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from attention_steps import GARBAGE, MIXES, Step, assert_meets_reference, make_step
from mm_engine.attention import torch_sdpa
from mm_engine.attention.torch_sdpa import CALL_COST, MAX_PADDING, cut_groups

HEADS = [(4, 4), (4, 2), (7, 1), (14, 2)]  # query and key heads: ratios 1, 2, 7
WINDOWS = [None, 1, 4, 24, 1000]


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("window", WINDOWS, ids=lambda w: f"window{w}")
def test_every_mix_and_window(mix: list[tuple[int, int]], window: int | None) -> None:
    assert_meets_reference(make_step(mix, window=window, block_size=16))


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("max_scores", [1, 100, torch_sdpa.MAX_SCORES], ids=lambda m: f"max{m}")
@pytest.mark.parametrize("window", [None, 4], ids=lambda w: f"window{w}")
def test_a_soft_cap_with_scores_in_any_number_of_pieces(
    mix: list[tuple[int, int]],
    max_scores: int,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch_sdpa, "MAX_SCORES", max_scores)
    step = make_step(mix, window=window, softcap=0.7)
    assert_meets_reference(step)
    if max(total for _, total in mix) > 1:  # a cap that nothing reaches would prove nothing
        capped, step.layer.softcap = step.run(), None
        assert not torch.allclose(capped, step.run(), atol=1e-3)


@pytest.mark.parametrize("window", [12, 13, 14], ids=lambda w: f"window{w}")
def test_a_window_about_as_long_as_the_sequence(window: int) -> None:
    assert_meets_reference(make_step([(1, 13)], window=window))
    assert_meets_reference(make_step([(13, 13)], window=window))


@pytest.mark.parametrize("heads", HEADS, ids=lambda h: f"{h[0]}x{h[1]}")
@pytest.mark.parametrize("head_dim", [24, 60, 63, 64, 128], ids=lambda d: f"d{d}")
def test_every_head_size_and_ratio(heads: tuple[int, int], head_dim: int) -> None:
    for window in (None, 7):
        step = make_step(MIXES["all-kinds"], heads=heads, head_dim=head_dim, window=window)
        assert_meets_reference(step)


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_every_block_size(mix: list[tuple[int, int]], block_size: int) -> None:
    assert_meets_reference(make_step(mix, block_size=block_size, seed=block_size))


mixes = st.lists(
    st.tuples(st.integers(1, 20), st.integers(0, 70)).map(lambda t: (t[0], t[0] + t[1])),
    min_size=1,
    max_size=10,
)
decodes = st.lists(st.integers(1, 90).map(lambda total: (1, total)), min_size=1, max_size=12)


@settings(max_examples=60)
@given(
    mix=st.one_of(mixes, decodes, st.builds(lambda a, b: a + b, mixes, decodes)),
    window=st.one_of(st.none(), st.integers(1, 100)),
    block_size=st.integers(1, 17),
    call_cost=st.sampled_from([0, 64, CALL_COST]),  # 0: many groups; the real one: few
    softcap=st.sampled_from([None, 0.3, 50.0]),
    seed=st.integers(0, 10),
)
def test_random_mixes(
    mix: list[tuple[int, int]],
    window: int | None,
    block_size: int,
    call_cost: int,
    softcap: float | None,
    seed: int,
) -> None:
    step = make_step(
        mix, window=window, softcap=softcap, block_size=block_size, seed=seed, head_dim=8
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_sdpa, "CALL_COST", call_cost)
        assert_meets_reference(step)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_what_lies_in_unwritten_slots_does_not_matter(mix: list[tuple[int, int]]) -> None:
    for window in (None, 5):
        clean = make_step(mix, window=window, garbage=0.0).run()
        assert torch.equal(clean, make_step(mix, window=window, garbage=GARBAGE).run())


def test_layers_of_a_step_may_differ_in_window_and_soft_cap() -> None:
    step = make_step(MIXES["all-kinds"], window=6)
    assert_meets_reference(step)
    step.layer.sliding_window = None  # the plan is shared, the mask must not be
    assert_meets_reference(step)
    step.layer.softcap = 0.5
    assert_meets_reference(step)


@pytest.mark.parametrize("softcap", [None, 0.7], ids=["plain", "softcap"])
def test_bfloat16_stays_near_the_reference(softcap: float | None) -> None:
    mix = MIXES["all-kinds"]
    step = make_step(mix, dtype=torch.bfloat16, garbage=100.0, softcap=softcap)
    assert_meets_reference(step, 2e-2)


def count_calls(step: Step, monkeypatch: pytest.MonkeyPatch) -> int:
    """How often one layer calls PyTorch's attention."""
    real, num_calls = torch_sdpa.scaled_dot_product_attention, 0

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal num_calls
        num_calls += 1
        return real(*args, **kwargs)

    monkeypatch.setattr(torch_sdpa, "scaled_dot_product_attention", counting)
    step.run()
    return num_calls


def test_decodes_of_similar_length_are_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step([(1, 400 + 3 * i) for i in range(32)], head_dim=8)
    assert count_calls(step, monkeypatch) == 1


def test_decodes_beside_a_prompt_are_two_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    step = make_step([(1, 300 + i) for i in range(16)] + [(200, 200)], head_dim=8)
    assert count_calls(step, monkeypatch) == 2


@given(
    shapes=st.lists(
        st.tuples(st.integers(1, 300), st.integers(0, 2000)).map(lambda t: (t[0], t[0] + t[1])),
        min_size=1,
        max_size=40,
    )
)
def test_groups_hold_each_sequence_once_and_pad_little(shapes: list[tuple[int, int]]) -> None:
    query_lens, context_lens = [q for q, _ in shapes], [c for _, c in shapes]
    groups = cut_groups(query_lens, context_lens)
    assert sorted(i for group in groups for i in group) == list(range(len(shapes)))
    for group in groups:
        real = sum(query_lens[i] * context_lens[i] for i in group)
        widest, longest = max(query_lens[i] for i in group), max(context_lens[i] for i in group)
        padded = len(group) * widest * longest
        assert padded == real or padded <= MAX_PADDING * real + CALL_COST


def test_no_group_is_cut_where_padding_costs_less_than_a_call() -> None:
    assert len(cut_groups([1] * 20, list(range(1, 21)))) == 1
    assert len(cut_groups([1, 1], [10, 100_000])) == 2
