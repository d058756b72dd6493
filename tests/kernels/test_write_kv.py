"""Keys and values go to their slots, bit for bit as the reference stores them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from mm_engine_kernels import reference
from torch import Tensor

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}


def bits(x: Tensor) -> Tensor:
    found = x.view(BITS[x.element_size()])
    if x.dtype == torch.float8_e4m3fn:
        found = found.masked_fill((found & 0x7F) == 0x7F, 0x7F)  # NaN has two signs and no meaning
    return found


def assert_stored_alike(
    kernels: Any, key: Tensor, value: Tensor, cache_dtype: torch.dtype, slots: Tensor, size: int
) -> None:
    shape = (int(slots.max()) // size + 2, size, *key.shape[1:])
    expected = torch.full((2, *shape), 7.0, device=key.device).to(cache_dtype)
    # In the kernel's caches keys and values of a block lie side by side.
    got = torch.full((shape[0], 2, *shape[1:]), 7.0, device=key.device).to(cache_dtype)
    reference.write_kv(key, value, expected[0], expected[1], slots)
    kernels.write_kv(key, value, got[:, 0], got[:, 1], slots)
    assert torch.equal(bits(got[:, 0]), bits(expected[0]))
    assert torch.equal(bits(got[:, 1]), bits(expected[1]))


@pytest.mark.parametrize(
    "cache_dtype", [torch.float16, torch.float32, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("shape", [(1, 1, 64), (5, 2, 63), (4, 3, 24), (3, 8, 128)], ids=str)
@pytest.mark.parametrize("block_size", [1, 3, 16])
def test_slices_of_a_fused_projection(
    shape: tuple[int, int, int],
    block_size: int,
    cache_dtype: torch.dtype,
    kernels: Any,
    device: str,
) -> None:
    num, heads, dim = shape
    fused = torch.randn(num, 4 * heads, dim, device=device)
    key, value = fused[:, 2 * heads : 3 * heads], fused[:, 3 * heads :]
    slots = torch.randperm(2 * num, device=device)[:num] * 5
    assert_stored_alike(kernels, key, value, cache_dtype, slots, block_size)


def test_rows_of_slot_minus_one_are_stored_nowhere(kernels: Any, device: str) -> None:
    rows = torch.randn(2, 4, 2, 8, device=device)
    slots = torch.tensor([3, -1, 0, -1], device=device)
    assert_stored_alike(kernels, rows[0], rows[1], torch.float32, slots, 4)


def test_fp8_rounds_and_saturates_as_torch_does(kernels: Any, device: str) -> None:
    """Every bfloat16 there is: all exponents, ties, subnormals, infinities and NaN."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rows = every.to(device).view(8, 64, 128)
    slots = torch.arange(8, device=device)
    assert_stored_alike(kernels, rows, rows.flip(0), torch.float8_e4m3fn, slots, 16)


def test_fp8_ties_of_float32_go_to_the_even_one(kernels: Any, device: str) -> None:
    steps = torch.arange(256, dtype=torch.float32) / 256
    near = torch.cat([(steps + 1) * 2.0**e for e in (-10, -9, -8, -7, -6, -1, 8)])
    near = torch.cat((near, near * (1 + 2**-23), -near * (1 - 2**-23))).to(device)
    rows = near.view(-1, 6, 128)
    slots = torch.arange(len(rows), device=device)
    assert_stored_alike(kernels, rows, -rows, torch.float8_e4m3fn, slots, 16)


def test_bfloat16_caches_hold_float32_to_the_nearest(kernels: Any, device: str) -> None:
    rows = torch.randn(2, 3, 2, 8, device=device)
    caches = torch.zeros(2, 1, 16, 2, 8, device=device, dtype=torch.bfloat16)
    kernels.write_kv(rows[0], rows[1], caches[0], caches[1], torch.arange(3, device=device))
    eps = torch.finfo(torch.bfloat16).eps  # the interpreter cuts where a card rounds
    torch.testing.assert_close(caches[:, 0, :3].float(), rows, rtol=eps, atol=0.0)
