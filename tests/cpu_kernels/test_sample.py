"""Sampling without a sort keeps the reference's ids and draws them, up to the rounding of sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import reference
from mm_engine_kernels.cpu.sample import sample
from torch import Tensor

INF = float("inf")
EPSILON = 2e-6  # of the distribution: what float32 weights and their sums may be off by


def rows(num: int, size: int, *, seed: int, spread: float = 3.0) -> Tensor:
    """Logits as of a model in bfloat16: many are tied exactly, and some can't come at all."""
    random = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num, size, generator=random) * spread).bfloat16().float()
    return logits.masked_fill(torch.rand(num, size, generator=random) < 0.1, -INF)


def columns(num: int, size: int, **values: float) -> dict[str, Tensor]:
    """One value of each parameter for all rows; what isn't named cuts nothing."""
    all_of: dict[str, Any] = {"temperature": 1.0, "top_k": size, "top_p": 1.0, "min_p": 0.0}
    return {name: torch.tensor([value] * num) for name, value in (all_of | values).items()}


def check(logits: Tensor, uniform: Tensor, params: dict[str, Tensor]) -> list[int]:
    """Compare what is kept and drawn with what float64 gives; returns the ids drawn."""
    kept = torch.empty_like(logits, memory_format=torch.contiguous_format)
    got = sample(logits, uniform, **params, kept=kept)
    plain = sample(logits, uniform, **params)  # which may sum in another order
    # Ties are of float32 logits, so these are what is made float64.
    exact = (logits / params["temperature"][:, None]).double().softmax(-1)
    assert bool(((kept == 0) | ((kept / kept.sum(-1, True) > 0) & (exact > 0))).all())
    for i in range(len(logits)):
        one = {name: value[i] for name, value in params.items()}
        doubtful = assert_kept(exact[i], kept[i] > 0, one)
        probs = exact[i] * (kept[i] > 0)
        cumulative = probs.cumsum(0) / probs.sum()
        expected = int(torch.searchsorted(cumulative, uniform[i].double(), right=True))
        if not bool(((cumulative - uniform[i].double()).abs() <= EPSILON).any()):
            assert got[i] == plain[i] == expected
            if not doubtful:
                row = {name: value[i : i + 1] for name, value in params.items()}
                assert got[i] == reference.sample(logits[i : i + 1], uniform[i : i + 1], **row)
        # Where rounding decides, it decides among ids that are kept.
        assert kept[i, got[i]] > 0 and kept[i, plain[i]] > 0
    return got.tolist()


def assert_kept(exact: Tensor, kept: Tensor, params: dict[str, Tensor]) -> bool:
    """What is kept is what must be, but where a cut lies within rounding; whether any was there."""
    ordered, ids = exact.sort(descending=True, stable=True)
    k = int(params["top_k"])
    ordered[k:] = 0
    ordered /= ordered.sum()
    before = ordered.cumsum(0) - ordered
    p, floor = float(params["top_p"]), float(params["min_p"])
    clear = torch.ones_like(kept)
    stays = ordered > 1e-36 / exact.max()  # e^-87 and less is nothing in float32
    clear &= stays | (ordered == 0)
    if p < 1:
        reached = before >= p
        reached[0] = False
        stays &= ~reached
        clear[1:] &= ((before - p).abs() > EPSILON)[1:]
    if floor > 0:
        share = ordered / ordered[0]
        stays &= ~(share < floor)
        clear &= ((share - floor).abs() > EPSILON * floor) | (share == 1)
    wrong = (kept[ids] != stays) & clear
    assert not wrong.any()
    return not bool(clear.all())


CUTS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 20},
    {"top_p": 0.0},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
]


@pytest.mark.parametrize(
    "values", CUTS, ids=lambda v: "-".join(f"{k}{x}" for k, x in v.items()) or "plain"
)
@pytest.mark.parametrize("size", [63, 300, 3000])
def test_one_cut_at_a_time(isa: str, size: int, values: dict[str, float]) -> None:
    uniform = torch.tensor([0.3, 1.0 - 2**-53], dtype=torch.float64)
    check(rows(2, size, seed=size), uniform, columns(2, size, **values))


def test_rows_have_their_own_cuts(isa: str, threads: int) -> None:
    random = torch.Generator().manual_seed(2)
    num, size = 24, 1000
    top_k = torch.randint(1, 60, (num,), generator=random)
    top_k[::3] = size
    params = {
        "temperature": torch.rand(num, generator=random) + 0.3,
        "top_k": top_k,
        "top_p": torch.rand(num, generator=random).masked_fill(torch.arange(num) % 4 == 0, 1.0),
        "min_p": torch.rand(num, generator=random) * (torch.arange(num) % 2) * 0.1,
    }
    uniform = torch.rand(num, generator=random, dtype=torch.float64)
    logits = rows(num, size, seed=3)
    before = logits.clone()
    check(logits, uniform, params)
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ({"top_k": 2}, [0, 1]),
        ({"top_p": 0.26}, [0, 1, 2]),  # of eighths: the one that reaches the mass stays
        ({"top_p": 0.24}, [0, 1]),
        ({"top_k": 4, "top_p": 0.6}, [0, 1, 2]),  # shares of what top_k left
        ({"min_p": 1.0, "top_k": 7}, [0, 1, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
def test_ties_go_to_the_lower_id(isa: str, values: dict[str, float], kept: list[int]) -> None:
    """Also where something that can't come lies before and between them."""
    logits = torch.full((len(kept), 40), -INF)
    logits[:, 3::5] = 2.5
    middles = (torch.arange(len(kept), dtype=torch.float64) + 0.5) / len(kept)
    assert check(logits, middles, columns(len(kept), 40, **values)) == [3 + 5 * i for i in kept]


@pytest.mark.parametrize("values", [{"top_k": 2500}, {"top_p": 0.5}, {"top_k": 3, "top_p": 0.9}])
def test_a_row_that_is_one_tie(isa: str, values: dict[str, float]) -> None:
    uniform = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    last = {2500: 2499, 3: 2}.get(int(values.get("top_k", 0)), 2499)
    assert check(torch.zeros(2, 5000), uniform, columns(2, 5000, **values)) == [0, last]


def test_a_draw_on_a_boundary_takes_the_next_id(isa: str) -> None:
    uniform = torch.tensor([0.25, 0.5], dtype=torch.float64)
    assert sample(torch.zeros(2, 8), uniform, **columns(2, 8)).tolist() == [2, 4]


def test_the_outermost_draws_take_no_id_that_was_cut(isa: str) -> None:
    logits = torch.tensor([[0.0, 0.0, 5.0, 5.0, 5.0, 0.0, 0.0]]).expand(2, -1)
    uniform = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    assert sample(logits, uniform, **columns(2, 7, top_k=3)).tolist() == [2, 4]


@pytest.mark.parametrize("size", [32_003, 151_936, 262_144])
def test_large_vocabularies(isa: str, size: int) -> None:
    logits = rows(3, size, seed=size, spread=4.0)
    uniform = torch.tensor([0.37, 0.81, 0.999])  # float32 will do, too
    params = columns(3, size, top_p=0.9, temperature=0.8)
    params["top_k"][0] = 50
    params["top_p"][2] = 1.0
    check(logits, uniform, params)


@pytest.mark.parametrize("values", [{}, {"top_k": 3, "top_p": 0.5}], ids=str)
def test_draws_come_as_often_as_they_should(isa: str, values: dict[str, float]) -> None:
    num = 4000
    logits = torch.tensor([1.0, 3.0, -INF, 2.5, 2.5, 0.0]).expand(num, -1)
    params = columns(num, 6, **values)
    uniform = (torch.arange(num, dtype=torch.float64) + 0.5) / num
    drawn = sample(logits, uniform, **params).bincount(minlength=6) / num
    probs = reference.kept_probs(logits[:1], **{k: v[:1] for k, v in params.items()})[0]
    torch.testing.assert_close(drawn, probs / probs.sum(), rtol=0, atol=1e-3)


@settings(max_examples=60)
@given(data=st.data())
def test_any_rows(data: st.DataObject, isa: str) -> None:
    size = data.draw(st.integers(1, 70))
    levels = st.sampled_from([-INF, -90.0, -9.0, -1.0, 0.0, 0.5, 0.5078125, 3.0, 60.0])
    row = data.draw(st.lists(levels, min_size=size, max_size=size).filter(lambda r: max(r) > -INF))
    values = {
        "temperature": data.draw(st.sampled_from([0.05, 1.0, 4.0])),
        "top_k": data.draw(st.integers(1, size + 1)),
        "top_p": data.draw(st.floats(0.0, 1.0, width=32)),
        "min_p": data.draw(st.sampled_from([0.0, 0.07, 1.0])),
    }
    uniform = torch.tensor([data.draw(st.floats(0.0, 1.0, exclude_max=True))], dtype=torch.float64)
    check(torch.tensor([row]), uniform, columns(1, size, **values))


@settings(max_examples=20)
@given(
    size=st.integers(1, 70) | st.sampled_from([1023, 1025, 5000]),
    spread=st.sampled_from([0.0, 0.01, 3.0, 30.0]),
    top_k=st.integers(1, 100),
    top_p=st.floats(0.0, 1.0, width=32),
    seed=st.integers(0, 1000),
)
def test_any_distribution(
    isa: str, size: int, spread: float, top_k: int, top_p: float, seed: int
) -> None:
    params = columns(4, size, top_p=top_p)
    params["top_k"][::2] = top_k
    uniform = torch.rand(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits = rows(4, size, seed=seed, spread=spread)
    logits[:, seed % size] = 1.0  # one that can come
    check(logits, uniform, params)


def test_rows_that_lie_apart_or_unaligned(isa: str) -> None:
    wide = rows(9, 301, seed=4)
    uniform = torch.tensor([0.2, 0.7, 0.9])
    for logits in (wide[::3, 1:258], wide.T[:3, :7] + 0.0, wide.T[::101, :9]):
        check(logits, uniform, columns(3, logits.shape[1], top_p=0.8))


def test_a_row_without_a_distribution_draws_0(isa: str) -> None:
    """As in the reference. Its neighbours draw as ever."""
    logits = torch.zeros(5, 40)
    logits[0, 39], logits[1, 3], logits[2, :] = float("nan"), INF, -INF
    logits[4, 0] = -INF
    uniform = torch.full((5,), 0.99)
    for values in ({}, {"top_k": 5, "top_p": 0.9, "min_p": 0.1}):
        params = columns(5, 40, **values)
        expected = reference.sample(logits, uniform, **params)
        assert expected[:3].tolist() == [0, 0, 0]
        kept = torch.empty(5, 40)
        assert torch.equal(sample(logits, uniform, **params, kept=kept), expected)
        assert kept[:3].count_nonzero() == 0


def test_no_rows_and_what_does_not_fit() -> None:
    assert sample(torch.zeros(0, 8), torch.zeros(0), **columns(0, 8)).shape == (0,)
    with pytest.raises(ValueError, match="each of 2 rows"):
        sample(torch.zeros(2, 8), torch.zeros(3), **columns(2, 8))
    half = torch.zeros(2, 8, dtype=torch.bfloat16)
    uniform = torch.tensor([0.3, 0.9])
    assert sample(half, uniform, **columns(2, 8)).tolist() == [2, 7]
