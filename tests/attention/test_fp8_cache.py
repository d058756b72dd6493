"""A KV cache in FP8: what is attended to is what the cache holds, however a prompt is cut."""

from __future__ import annotations

import math

import pytest
import torch
from mm_engine_kernels import reference
from mm_engine_kernels.quantized import FP8
from torch import Tensor

from mm_engine.attention.backend import Attention
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.attention.torch_sdpa import TorchAttention

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 24, 4
NUM_TOKENS = 21
BACKEND = TorchAttention()


def rows(heads: int, seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(NUM_TOKENS, heads, DIM, generator=generator).to(dtype)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layer: Attention,
    chunks: list[int],
    dtype: torch.dtype,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One sequence's attention in steps of so many tokens each, and the cache that is left."""
    num_blocks = -(-NUM_TOKENS // BLOCK)
    table = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5))
    caches = tuple(torch.zeros(num_blocks, BLOCK, KV_HEADS, DIM, dtype=dtype) for _ in range(2))
    places = torch.arange(NUM_TOKENS)
    slots = table[places // BLOCK] * BLOCK + places % BLOCK
    out, done = [], 0
    for num in chunks:
        metadata = AttentionMetadata.of_lens(
            BACKEND,
            [(caches[0], caches[1])],
            slot_mapping=slots[done : done + num],
            block_tables=table[None],
            query_lens=[num],
            context_lens=[done + num],
        )
        part = (tensor[done : done + num] for tensor in (query, key, value))
        out.append(layer(*part, metadata))
        done += num
    return torch.cat(out), (caches[0], caches[1])


def make_layer(**options: float) -> Attention:
    layer = Attention(HEADS, KV_HEADS, DIM, **options)  # type: ignore[arg-type]
    layer.layer_index = 0
    return layer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"sliding_window": 6}, {"softcap": 0.7}], ids=str)
@pytest.mark.parametrize("chunks", [[21], [5, 9, 7], [1] * 21, [20, 1]], ids=str)
def test_chunks_and_whole_prompts_attend_to_the_same(
    chunks: list[int], options: dict[str, float], dtype: torch.dtype
) -> None:
    layer = make_layer(**options)
    query, key, value = rows(HEADS, 0, dtype), rows(KV_HEADS, 1, dtype), rows(KV_HEADS, 2, dtype)
    got, caches = attend(query, key, value, layer, chunks, FP8)
    assert got.dtype == dtype
    rounded = (key.to(FP8).to(dtype), value.to(FP8).to(dtype))
    expected, _ = attend(query, *rounded, layer, chunks, dtype)
    assert torch.equal(got, expected)  # all that FP8 changes is the numbers
    plain, _ = attend(query, key, value, layer, chunks, dtype)
    assert not torch.allclose(got, plain, rtol=1e-3, atol=1e-3)
    whole, _ = attend(query, key, value, layer, [21], FP8)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, whole, rtol=tolerance, atol=tolerance)
    table = torch.randperm(6, generator=torch.Generator().manual_seed(5))[None]
    meaning = reference.paged_attention(
        query, *caches, table, [21], [21], layer.scale, layer.sliding_window, layer.softcap
    )
    torch.testing.assert_close(got, meaning, rtol=tolerance, atol=tolerance)


def test_what_is_too_large_is_saturated_and_nan_stays() -> None:
    caches = tuple(torch.zeros(2, BLOCK, 1, 3, dtype=FP8) for _ in range(2))
    key = torch.tensor([[[1.0, 1e4, -1e4]], [[math.nan, 0.3, 448.0]]])
    reference.write_kv(key, -key, *caches, torch.tensor([6, 1]))
    keys, values = (cache.float().flatten(0, 1)[:, 0] for cache in caches)
    assert keys[6].tolist() == [1.0, 448.0, -448.0] and values[6].tolist() == [-1.0, -448.0, 448.0]
    assert keys[1].isnan().tolist() == [True, False, False]
    assert keys[1, 1:].tolist() == [0.3125, 448.0]
    assert not keys[[0, 2, 3, 4, 5, 7]].any()


@pytest.mark.parametrize("chunks", [[21], [10, 11]], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_fault_is_seen_by_what_attends_to_it(bad: float, chunks: list[int]) -> None:
    query, key, value = (rows(heads, 3, torch.float32) for heads in (HEADS, KV_HEADS, KV_HEADS))
    value[4, 0, 0] = bad
    out, _ = attend(query, key, value, make_layer(), chunks, FP8)
    assert not out[4:].isfinite().flatten(1).all(1).any()
