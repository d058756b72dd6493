"""Rows at their positions, as the reference puts them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import reference
from mm_engine_kernels.cpu.merge_by_position import merge_by_position
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def check(embeddings: Tensor, rows: Tensor, positions: Tensor) -> None:
    expected = reference.merge_by_position(embeddings.clone(), rows, positions)
    assert merge_by_position(embeddings, rows, positions) is embeddings
    torch.testing.assert_close(embeddings, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("rows_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(
    num=st.integers(0, 9) | st.sampled_from([300]),
    size=st.integers(1, 70) | st.sampled_from([896, 1500]),
    seed=st.integers(0, 1000),
)
def test_merge(
    isa: str,
    threads: int,
    dtype: torch.dtype,
    rows_dtype: torch.dtype,
    num: int,
    size: int,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(2 * num + 1, size, generator=random).to(dtype)
    rows = torch.randn(num, size, generator=random).to(rows_dtype)
    check(embeddings, rows, torch.randperm(2 * num + 1, generator=random)[:num])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16], ids=str)
@pytest.mark.parametrize("rows_dtype", [*DTYPES, torch.float16], ids=str)
def test_any_dtype_and_any_layout(isa: str, dtype: torch.dtype, rows_dtype: torch.dtype) -> None:
    wide = torch.randn(7, 91).to(dtype)
    rows = torch.randn(50, 50).to(rows_dtype)
    rows[2, 2] = float("nan")
    positions = torch.tensor([6, 9, 0, 9, 3, 9])
    check(wide[:, 1:41], rows[1:4, 3:43], positions[::2])
    check(wide[:, 1:41], rows.T[1:4, 3:43], positions[::2])
    check(wide.T[:41], rows[:3, :7], positions[::2])


def test_a_position_that_is_not_there_is_refused() -> None:
    embeddings = torch.zeros(4, 8)
    for position in (4, -1, 1 << 60):
        with pytest.raises(IndexError, match="from 0 to 3"):
            merge_by_position(embeddings, torch.ones(2, 8), torch.tensor([0, position]))
    assert not embeddings.any()
