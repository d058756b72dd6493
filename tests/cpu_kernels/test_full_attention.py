"""Attention without a mask, against the same in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import ops, reference
from mm_engine_kernels.cpu.full_attention import full_attention
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2.0**-7}
pytestmark = pytest.mark.usefixtures("isa", "threads")


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def exact(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """In float64, head by head of every batch."""
    groups = query.shape[2] // key.shape[2]
    key, value = (x.double().repeat_interleave(groups, dim=2) for x in (key, value))
    scores = torch.einsum("nthd,nlhd->nhtl", query.double(), key) * scale
    return torch.einsum("nhtl,nlhd->nthd", scores.softmax(-1), value)


def check(query: Tensor, key: Tensor, value: Tensor, scale: float = 0.2) -> None:
    got = full_attention(query, key, value, scale)
    assert got.dtype == query.dtype and got.is_contiguous()
    expected = exact(query, key, value, scale)
    largest = float(value.abs().max())
    assert float((got.double() - expected).abs().max()) <= TOLERANCE[query.dtype] * largest


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2)], ids=str)
@pytest.mark.parametrize("dim", [40, 64, 72, 80])
def test_every_query_sees_every_key(dtype: torch.dtype, heads: tuple[int, int], dim: int) -> None:
    query = noise(2, 130, heads[0], dim, dtype=dtype)
    key, value = (noise(2, 130, heads[1], dim, dtype=dtype, seed=i) for i in (1, 2))
    check(query, key, value)
    # The first query is told from a causal one's by the keys behind it.
    assert not torch.equal(
        full_attention(query, key, value, 0.2)[:, 0],
        full_attention(query[:, :1], key[:, :1], value[:, :1], 0.2)[:, 0],
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 150), st.integers(1, 300), st.integers(1, 3),
    st.integers(1, 4), st.integers(1, 100), st.sampled_from(DTYPES),
)  # fmt: skip
def test_any_shape(
    num: int, queries: int, keys: int, kv_heads: int, groups: int, dim: int, dtype: torch.dtype
) -> None:
    query = noise(num, queries, kv_heads * groups, dim, dtype=dtype)
    key, value = (noise(num, keys, kv_heads, dim, dtype=dtype, seed=i) for i in (1, 2))
    check(query, key, value)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_views_are_read_where_they_lie(dtype: torch.dtype) -> None:
    fused = noise(2, 50, 3, 4, 32, dtype=dtype)
    check(*fused.unbind(2))
    by_heads = noise(3, 2, 4, 50, 32, dtype=dtype)
    check(*(x.transpose(1, 2) for x in by_heads))
    reversed_ = noise(3, 2, 32, 4, 50, dtype=dtype)
    check(*(x.permute(0, 3, 2, 1) for x in reversed_))


def test_a_batch_is_its_own() -> None:
    query, key, value = (noise(3, 70, 4, 32, seed=i) for i in range(3))
    together = full_attention(query, key, value, 0.2)
    for i in range(3):
        part = slice(i, i + 1)
        alone = full_attention(query[part], key[part], value[part], 0.2)
        assert torch.equal(together[part], alone)


def test_a_nan_stays_in_its_own_of_the_batch() -> None:
    query, key, value = (noise(2, 70, 4, 32, seed=i) for i in range(3))
    key[0, 3, 1, 5] = float("nan")
    got = full_attention(query, key, value, 0.2)
    assert got[0, :, 1].isnan().all()
    assert got[0, :, [0, 2, 3]].isfinite().all() and got[1].isfinite().all()


def test_nothing_to_compute() -> None:
    empty = noise(0, 5, 2, 16)
    assert full_attention(empty, empty, empty, 0.2).shape == (0, 5, 2, 16)
    key = noise(2, 5, 2, 16)
    assert full_attention(noise(2, 0, 2, 16), key, key, 0.2).shape == (2, 0, 2, 16)


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        ((2, 5, 2, 8), (2, 5, 2, 16)),
        ((1, 5, 2, 16), (1, 5, 2, 16)),
        ((2, 0, 2, 16), (2, 0, 2, 16)),
        ((2, 5, 3, 16), (2, 5, 3, 16)),
        ((2, 5, 2, 16), (2, 4, 2, 16)),
        ((2, 5, 0, 16), (2, 5, 0, 16)),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="don't fit"):
        full_attention(noise(2, 6, 4, 16), torch.zeros(keys), torch.zeros(values), 0.2)


def test_other_dtypes_are_the_references() -> None:
    query, key, value = (noise(1, 9, 2, 16, seed=i).double() for i in range(3))
    expected = reference.full_attention(query, key, value, 0.2)
    assert torch.equal(full_attention(query, key, value, 0.2), expected)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)], ids=str)
def test_the_reference_means_the_same(heads: tuple[int, int]) -> None:
    query = noise(2, 33, heads[0], 24)
    key, value = (noise(2, 33, heads[1], 24, seed=i) for i in (1, 2))
    got = reference.full_attention(query, key, value, 0.2)
    torch.testing.assert_close(got.double(), exact(query, key, value, 0.2), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ops.full_attention(query, key, value, 0.2), got)
