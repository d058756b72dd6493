"""Rotary positions, the gate and the merge in Triton: the reference's, to the last rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mm_engine_kernels import reference
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def steps_apart(dtype: torch.dtype) -> dict[str, float]:
    """A few roundings; the interpreter cuts bfloat16 where a card rounds."""
    eps = torch.finfo(dtype).eps
    return {"rtol": 3 * eps, "atol": 3 * eps}


def noise(*shape: int, dtype: torch.dtype = torch.float32, device: str) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1, 1, 2), (3, 5, 24), (2, 4, 128), (4, 3, 80)], ids=str)
def test_rotary(shape: tuple[int, int, int], dtype: torch.dtype, kernels: Any, device: str) -> None:
    num, heads, dim = shape
    x = noise(num, heads + 2, dim, dtype=dtype, device=device)[:, 1 : 1 + heads]
    # Its halves need not be alike.
    angles = noise(num, dim, device=device) * 9
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    before = x.clone()
    got = kernels.rotary(x, cos, sin)
    assert got.is_contiguous() and torch.equal(x, before)
    torch.testing.assert_close(got, reference.rotary(x, cos, sin), **steps_apart(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1, 60, 63, 1024, 2500])
def test_silu_mul(size: int, dtype: torch.dtype, kernels: Any, device: str) -> None:
    x = noise(2, 3, 2 * size, dtype=dtype, device=device) * 4
    x[0, 0, 0], x[0, 1, 0] = -200.0, 200.0  # its exponential would overflow
    expected = reference.silu_mul(x)
    torch.testing.assert_close(kernels.silu_mul(x), expected, **steps_apart(dtype))


@pytest.mark.parametrize("size", [1, 63, 1500])
@pytest.mark.parametrize("rows_dtype", [torch.float16, torch.float32], ids=str)
def test_merge_by_position(rows_dtype: torch.dtype, size: int, kernels: Any, device: str) -> None:
    embeddings = noise(7, size, dtype=torch.float16, device=device)
    rows = noise(4, size + 1, dtype=rows_dtype, device=device)[1:, :size]
    positions = torch.tensor([6, 0, 3], device=device)
    expected = reference.merge_by_position(embeddings.clone(), rows, positions)
    assert kernels.merge_by_position(embeddings, rows, positions) is embeddings
    assert torch.equal(embeddings, expected)


def test_nothing_to_do(kernels: Any, device: str) -> None:
    x = torch.ones(3, 8, device=device)
    assert kernels.silu_mul(x[:0]).shape == (0, 4)
    assert kernels.rotary(x[:0].view(0, 2, 4), x[:0, :4], x[:0, :4]).shape == (0, 2, 4)
    none = torch.empty(0, dtype=torch.int64, device=device)
    assert torch.equal(kernels.merge_by_position(x, x[:0], none), torch.ones(3, 8, device=device))
