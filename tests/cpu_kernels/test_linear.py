"""Packed linear layers against the same product in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels.cpu.linear import PackedLinear, pack_linear
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
EPS = {torch.float32: 1.2e-7, torch.bfloat16: 2.0**-8}


def packed(weight: Tensor) -> PackedLinear:
    made = pack_linear(weight)
    assert made is not None
    return made


def check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    got = packed(weight)(x, bias, residual)
    exact = x.double() @ weight.double().T
    size = x.double().abs() @ weight.double().abs().T
    for part in (bias, residual):
        if part is not None:
            exact, size = exact + part.double(), size + part.double().abs()
    # A float32 sum of K terms errs by at most K steps of the terms' sizes, and in practice by few;
    # the result is rounded once.
    bound = size * 1.2e-7 * 16 + exact.abs() * EPS[x.dtype] + 1e-30
    assert got.dtype == x.dtype
    assert got.shape == exact.shape
    assert bool(((got.double() - exact).abs() <= bound).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=60)
@given(
    m=st.integers(1, 30) | st.sampled_from([97, 400]),
    n=st.integers(1, 100) | st.sampled_from([127, 128, 129, 1040]),
    k=st.integers(1, 80) | st.sampled_from([255, 256, 257, 511, 513, 1030]),
    with_bias=st.booleans(),
    with_residual=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_linear(
    isa: str,
    threads: int,
    dtype: torch.dtype,
    m: int,
    n: int,
    k: int,
    with_bias: bool,
    with_residual: bool,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random).to(dtype)

    bias = noise(n) if with_bias else None
    residual = noise(m, n) if with_residual else None
    check(noise(m, k), noise(n, k), bias, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart_or_unaligned(isa: str, dtype: torch.dtype) -> None:
    wide = torch.randn(9, 301).to(dtype)
    weight = torch.randn(130, 301).to(dtype)
    check(wide[::2, 1:258], weight[1::2, 3:260], None, None)  # rows apart, starts unaligned
    check(wide.T[:40, :5], weight.T[:33, :5], None, None)  # columns apart
    residual = torch.randn(33, 40).to(dtype).T  # and what is added
    check(wide.T[:40, :5], weight.T[:33, :5], wide[0, 1:34], residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_rows(isa: str, dtype: torch.dtype) -> None:
    layer = packed(torch.randn(5, 3).to(dtype))
    assert layer(torch.zeros(0, 3, dtype=dtype)).shape == (0, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [1, 3, 100])
def test_nan_and_infinity_come_out_as_such(isa: str, dtype: torch.dtype, m: int) -> None:
    weight = torch.ones(20, 33, dtype=dtype)
    weight[3, 32] = float("nan")
    weight[17, 0] = float("inf")
    out = packed(weight)(torch.ones(m, 33, dtype=dtype))
    assert bool(out[:, 3].isnan().all())
    assert bool((out[:, 17] == float("inf")).all())
    rest = [i for i in range(20) if i not in (3, 17)]
    assert bool((out[:, rest] == 33).all())


def test_shapes_keep_their_leading_dimensions(isa: str) -> None:
    weight, x = torch.randn(6, 8), torch.randn(2, 3, 8)
    layer, residual = packed(weight), torch.randn(2, 3, 6)
    torch.testing.assert_close(layer(x, None, residual), x @ weight.T + residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_of_the_weight_come_back_as_they_were(dtype: torch.dtype) -> None:
    weight = torch.randn(37, 11).to(dtype)
    rows = torch.tensor([36, 0, 16, 16, 15])
    assert torch.equal(packed(weight).weight_rows(rows), weight[rows])


def test_what_does_not_fit_is_refused() -> None:
    layer = packed(torch.randn(6, 8))
    with pytest.raises(ValueError, match="x must be torch.float32 of 8 columns"):
        layer(torch.randn(2, 7))
    with pytest.raises(ValueError, match="x must be"):
        layer(torch.randn(2, 8).double())
    with pytest.raises(ValueError, match="bias must be"):
        layer(torch.randn(2, 8), torch.randn(5))
    with pytest.raises(ValueError, match="residual must be"):
        layer(torch.randn(2, 8), None, torch.randn(6, 2))
    with pytest.raises(IndexError, match="from 0 to 5"):
        layer.weight_rows(torch.tensor([6]))
    assert pack_linear(torch.randn(3, 4).half()) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(48, 22), (16, 2), (48, 23), (47, 22)], ids=str)
def test_a_weight_is_packed_in_its_own_memory_where_it_fits(
    shape: tuple[int, int], dtype: torch.dtype
) -> None:
    weight = torch.randn(shape).to(dtype)
    expected = weight.clone()
    layer = pack_linear(weight, in_place=True)
    assert layer is not None
    fits = shape[0] % 16 == 0 and (dtype == torch.float32 or shape[1] % 2 == 0)
    assert (layer.data.data_ptr() == weight.data_ptr()) == fits
    assert torch.equal(layer.weight(), expected)
    assert torch.equal(layer.data, packed(expected).data)


def test_rows_that_lie_apart_are_not_packed_in_place() -> None:
    both = torch.randn(32, 48)
    before = both.clone()
    layer = pack_linear(both[:, :24], in_place=True)
    assert layer is not None and torch.equal(layer.weight(), before[:, :24])
    assert torch.equal(both, before)
