"""Rows of a table in C++ against PyTorch's indexing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import reference
from mm_engine_kernels.cpu.gather_rows import gather_rows
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]


def check(table: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
    got = gather_rows(table, rows, dtype)
    assert got.dtype == dtype
    assert got.is_contiguous()
    expected = reference.gather_rows(table, rows, dtype)
    torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@settings(max_examples=25)
@given(
    num=st.integers(0, 9) | st.sampled_from([700]),
    num_rows=st.integers(1, 50),
    size=st.integers(1, 140),
    seed=st.integers(0, 1000),
)
def test_gather_rows(
    isa: str,
    threads: int,
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    num: int,
    num_rows: int,
    size: int,
    seed: int,
) -> None:
    random = torch.Generator().manual_seed(seed)
    table = torch.randn(num_rows, size, generator=random).to(dtype)
    table[0, 0] = float("nan")
    check(table, torch.randint(num_rows, (num,), generator=random), out_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_lie_apart_or_unaligned(isa: str, dtype: torch.dtype) -> None:
    wide = torch.randn(9, 91).to(dtype)
    rows = torch.tensor([8, 8, 0, 0, 3, 3])
    for table in (wide[:, 3:43], wide[1:, :77], wide[:, ::3], wide.t()[:9]):
        for chosen in (rows % len(table), (rows % len(table))[::2]):
            check(table, chosen, torch.float32)
            check(table, chosen, torch.bfloat16)


@pytest.mark.parametrize("row", [-1, 9])
def test_a_row_that_is_not_there_is_refused(row: int) -> None:
    with pytest.raises(IndexError, match=f"from 0 to 8, not {row}"):
        gather_rows(torch.randn(9, 4), torch.tensor([0, row]), torch.float32)


def test_what_the_kernel_does_not_take_is_the_references() -> None:
    table, rows = torch.randn(9, 4), torch.tensor([3, 1])
    assert torch.equal(gather_rows(table, rows, torch.float16), table[rows].half())
    assert torch.equal(gather_rows(table, rows.int(), torch.float32), table[rows])
