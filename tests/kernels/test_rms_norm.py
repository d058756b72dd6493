"""The norms in Triton are the reference's, to the last rounding."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mm_engine_kernels import reference
from torch import Tensor

SIZES = [1, 60, 63, 64, 1000]


def steps_apart(dtype: torch.dtype) -> dict[str, float]:
    """One step of the dtype; the interpreter cuts bfloat16 where a card rounds: three roundings."""
    if dtype == torch.float32:
        return {"rtol": 1e-6, "atol": 1e-6}
    return {"rtol": 3 * torch.finfo(dtype).eps, "atol": 1e-6}


def noise(*shape: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_rms_norm(size: int, dtype: torch.dtype, kernels: Any, device: str) -> None:
    x, weight = (noise(*s, dtype=dtype, device=device) for s in ((3, size), (size,)))
    expected = reference.rms_norm(x, weight, 1e-5)
    torch.testing.assert_close(kernels.rms_norm(x, weight, 1e-5), expected, **steps_apart(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm(size: int, dtype: torch.dtype, kernels: Any, device: str) -> None:
    x, residual = (noise(3, size, dtype=dtype, device=device) for _ in range(2))
    weight = noise(size, dtype=dtype, device=device)
    before = x.clone(), residual.clone()
    got = kernels.add_rms_norm(x, residual, weight, 1e-5)
    total = reference.add_rms_norm(x, residual, weight, 1e-5)[1]
    torch.testing.assert_close(got[1], total, **steps_apart(dtype))
    # The norm is that of the sum as it was rounded.
    expected = reference.rms_norm(got[1], weight, 1e-5)
    torch.testing.assert_close(got[0], expected, **steps_apart(dtype))
    assert torch.equal(x, before[0]) and torch.equal(residual, before[1])


def test_rows_may_lie_apart(kernels: Any, device: str) -> None:
    wide = noise(3, 5, 40, dtype=torch.float32, device=device)
    weight = noise(24, dtype=torch.float32, device=device)
    x, residual = wide[:, 1:3, :24], wide[:, 3:, 16:]
    expected = reference.add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(kernels.add_rms_norm(x, residual, weight, 1e-6), expected)
    alone = kernels.rms_norm(x, weight, 1e-6)
    torch.testing.assert_close(alone, reference.rms_norm(x, weight, 1e-6))


def test_no_rows(kernels: Any, device: str) -> None:
    x = torch.zeros(0, 8, device=device)
    assert kernels.rms_norm(x, x.new_ones(8), 1e-5).shape == (0, 8)
