"""Sampling without a sort keeps the reference's ids and draws them, up to the rounding of sums."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import reference
from torch import Tensor

INF = float("inf")
EPSILON = 2e-6  # of the distribution: what float32 weights and their sums may be off by


def rows(num: int, size: int, *, seed: int, spread: float = 3.0) -> Tensor:
    """Logits as of a model in bfloat16: many are tied exactly, and some can't come at all."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num, size, generator=generator) * spread).bfloat16().float()
    return logits.masked_fill(torch.rand(num, size, generator=generator) < 0.1, -INF)


def columns(num: int, size: int, device: str, **values: float) -> dict[str, Tensor]:
    """One value of each parameter for all rows; what isn't named cuts nothing."""
    all_of = {"temperature": 1.0, "top_k": size, "top_p": 1.0, "min_p": 0.0, **values}
    dtypes = {"top_k": torch.int64}
    return {
        name: torch.full((num,), value, dtype=dtypes.get(name, torch.float32), device=device)
        for name, value in all_of.items()
    }


def assert_meets_reference(
    kernels: Any, logits: Tensor, uniform: Tensor, params: dict[str, Tensor], **options: Any
) -> tuple[list[int], int]:
    """Compare what is kept and drawn; returns that, and how many draws were clear of a boundary."""
    kept = torch.empty_like(logits)
    got = kernels.sample(logits, uniform, **params, kept=kept, **options)
    expected = reference.sample(logits, uniform, **params)
    probs = reference.kept_probs(logits, **params).double()
    for i in (((kept > 0) != (probs > 0)).any(-1)).nonzero().flatten().tolist():
        one_row = {name: value[i : i + 1] for name, value in params.items()}
        assert_doubtful(logits[i], one_row, (kept[i] > 0) != (probs[i] > 0))
    cumulative = probs.cumsum(-1) / probs.sum(-1, keepdim=True)
    clear = ((cumulative - uniform.double()[:, None]).abs() > EPSILON).all(-1)
    assert torch.equal(got[clear], expected[clear])
    # Where rounding decides, it decides among ids that are kept.
    assert (kept.gather(1, got[:, None]) > 0).all()
    return got.tolist(), int(clear.sum())


def assert_doubtful(logits: Tensor, params: dict[str, Tensor], differs: Tensor) -> None:
    """Each of these ids lies within rounding of the mass at which top_p cuts."""
    uncut = params | {"top_p": torch.ones_like(params["top_p"]), "min_p": params["min_p"] * 0}
    probs = reference.kept_probs(logits[None], **uncut)[0].double()
    ordered, ids = probs.sort(descending=True, stable=True)
    before = torch.empty_like(probs).scatter_(0, ids, ordered.cumsum(0) - ordered) / probs.sum()
    assert ((before[differs] - params["top_p"].double()).abs() <= EPSILON).all()


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"temperature": 0.3},
        {"top_k": 1},
        {"top_k": 20},
        {"top_p": 0.0},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"temperature": 1.7, "top_k": 40, "top_p": 0.8, "min_p": 0.05},
    ],
    ids=lambda v: "-".join(f"{k}{x}" for k, x in v.items()) or "plain",
)
@pytest.mark.parametrize("size", [63, 300])
def test_one_cut_at_a_time(size: int, values: dict[str, float], kernels: Any, device: str) -> None:
    logits = rows(2, size, seed=size).to(device)
    uniform = torch.tensor([0.3, 1.0 - 2**-53], dtype=torch.float64, device=device)
    params = columns(2, size, device, **values)
    # Up to three tiles, the last of them cut.
    assert_meets_reference(kernels, logits, uniform, params, tile=128)


def test_rows_have_their_own_cuts(kernels: Any, device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    num, size = 12, 1000
    top_k = torch.randint(1, 60, (num,), generator=generator)
    top_k[::3] = size
    params = {
        "temperature": torch.rand(num, generator=generator) + 0.3,
        "top_k": top_k,
        "top_p": torch.rand(num, generator=generator).masked_fill(torch.arange(num) % 4 == 0, 1.0),
        "min_p": torch.rand(num, generator=generator) * (torch.arange(num) % 2) * 0.1,
    }
    params = {name: value.to(device) for name, value in params.items()}
    uniform = torch.rand(num, generator=generator, dtype=torch.float64).to(device)
    logits = rows(num, size, seed=3).to(device)
    before = logits.clone()
    assert assert_meets_reference(kernels, logits, uniform, params)[1] == num
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
def test_ties_go_to_the_lower_id(
    values: dict[str, float], kept: list[int], kernels: Any, device: str
) -> None:
    """Also when they lie in several tiles, behind something that can't come."""
    logits = torch.full((len(kept), 40), -INF, device=device)
    logits[:, 3::5] = 2.5
    middles = (torch.arange(len(kept), dtype=torch.float64, device=device) + 0.5) / len(kept)
    params = columns(len(kept), 40, device, **values)
    got, _ = assert_meets_reference(kernels, logits, middles, params, tile=32)
    assert got == [3 + 5 * i for i in kept]


def test_a_draw_on_a_boundary_takes_the_next_id(kernels: Any, device: str) -> None:
    logits = torch.zeros(2, 8, device=device)
    uniform = torch.tensor([0.25, 0.5], dtype=torch.float64, device=device)
    params = columns(2, 8, device)
    assert reference.sample(logits, uniform, **params).tolist() == [2, 4]
    assert kernels.sample(logits, uniform, **params, tile=4).tolist() == [2, 4]


def test_the_outermost_draws_take_no_id_that_was_cut(kernels: Any, device: str) -> None:
    logits = torch.tensor([[0.0, 0.0, 5.0, 5.0, 5.0, 0.0, 0.0]], device=device).expand(2, -1)
    uniform = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64, device=device)
    got = kernels.sample(logits, uniform, **columns(2, 7, device, top_k=3), tile=4)
    assert got.tolist() == [2, 4]


@pytest.mark.parametrize("size", [151_936, 32_064, 32_003])
def test_large_vocabularies(size: int, kernels: Any, device: str) -> None:
    logits = rows(2, size, seed=size, spread=4.0).to(device)
    uniform = torch.tensor([0.37, 0.81], device=device)  # float32 will do, too
    params = columns(2, size, device, top_p=0.9, temperature=0.8)
    params["top_k"][0] = 50
    assert_meets_reference(kernels, logits, uniform, params)


@settings(max_examples=8)
@given(data=st.data())
def test_any_rows(data: st.DataObject, kernels: Any, device: str) -> None:
    size = data.draw(st.integers(1, 70))
    levels = st.sampled_from([-INF, -9.0, -1.0, 0.0, 0.5, 0.5078125, 3.0, 60.0])
    row = data.draw(st.lists(levels, min_size=size, max_size=size).filter(lambda r: max(r) > -INF))
    values = {
        "temperature": data.draw(st.sampled_from([0.05, 1.0, 4.0])),
        "top_k": data.draw(st.integers(1, size)),
        "top_p": data.draw(st.floats(1e-3, 1.0)),
        "min_p": data.draw(st.sampled_from([0.0, 0.07, 1.0])),
    }
    uniform = torch.tensor([data.draw(st.floats(0.0, 1.0, exclude_max=True))], device=device)
    params = columns(1, size, device, **values)
    assert_meets_reference(
        kernels, torch.tensor([row], device=device), uniform.double(), params, tile=32
    )
