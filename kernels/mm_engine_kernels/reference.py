"""The plain PyTorch meaning of every kernel. Faster ones are held to these, and nothing else is.

Shapes: T tokens of one step over all sequences, S sequences, H query heads, K key/value heads,
D head size. A KV cache is `[num_blocks, block_size, K, D]`, of the keys' dtype or FP8 (e4m3);
slot = block * block_size + offset.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mm_engine_kernels.quantized import FP8, to_fp8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: `[..., in]` by `[out, in]` to `[..., out]`."""
    return torch.nn.functional.linear(x, weight, bias)


class Packed(Protocol):
    """A linear layer's weight, laid out for a device."""

    @property
    def nbytes(self) -> int:
        """Of memory that it takes."""
        ...

    def weight(self) -> Tensor:
        """The weight as it was, `[N, K]`."""
        ...

    def weight_rows(self, rows: Tensor) -> Tensor:
        """The rows `rows` `[R]` of the weight, as they were: `[R, K]`.

        Raises:
            IndexError: the weight has no such row.
        """
        ...

    def refill(self, weight: Tensor) -> None:
        """Hold `weight` `[N, K]` from now on, in the memory of the one before.

        Raises:
            ValueError: its shape or dtype is another.
        """
        ...

    def __call__(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`linear`, plus `residual`, which is shaped like the result."""
        ...


def pack_linear(weight: Tensor, *, in_place: bool = False) -> Packed | None:
    """`weight` `[N, K]`, laid out for the device; None: it has no such layout.

    With `in_place` that may be in the memory of `weight`, which is given up.
    """
    return None


def quantize_linear(weight: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
    """`weight` `[N, K]` in 8 or 4 bits: bytes and scales in a layout of the device's own, for
    `linear_quantized`; None: the device has no kernels for it.
    """
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm over the last dimension, computed in float32 (arXiv:1910.07467)."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`residual + x`, and its norm: returns (normed, new residual)."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def gather_rows(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows `rows` `[N]` of `table` `[R, D]`, in `dtype`: `[N, D]`."""
    return table[rows].to(dtype)


def argmax(x: Tensor) -> Tensor:
    """Where the largest of each row of `x` `[N, V]` is: `[N]` int64. The first of equals; of a row
    with NaN, any."""
    return x.argmax(-1)


def amax(x: Tensor) -> Tensor:
    """The largest of each row of `x` `[N, V]`: `[N]`; NaN if one is."""
    return x.amax(-1)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[T, heads, D]` by `cos` and `sin` `[T, D]` (halves, not pairs: arXiv:2104.09864)."""
    first, second = x.chunk(2, dim=-1)
    rotated = torch.cat((-second, first), dim=-1)
    return x * cos.unsqueeze(1) + rotated * sin.unsqueeze(1)


def silu_mul(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up` of `[..., 2 * intermediate]` to `[..., intermediate]`."""
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Store `[T, K, D]` keys and values at `slot_mapping` `[T]`, in place, as `cached` has them.

    A slot of -1 is a padding row's: it is stored nowhere.
    """
    if slot_mapping.numel() and int(slot_mapping.min()) < 0:
        real = slot_mapping >= 0
        key, value, slot_mapping = key[real], value[real], slot_mapping[real]
    for rows, cache in ((key, key_cache), (value, value_cache)):
        slots = indexable(cache).view(-1, *cache.shape[2:])  # never a copy
        slots.index_copy_(0, slot_mapping, indexable(cached(rows, cache.dtype)))


def cached(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values as a cache of `dtype` holds them.

    In FP8 that is with scale 1: what is beyond ±448 becomes ±448. NaN and infinity become NaN.
    """
    return to_fp8(x) if dtype == FP8 and x.dtype != FP8 else x.to(dtype)


def indexable(cache: Tensor) -> Tensor:
    """The cache in a dtype that all of PyTorch's index operators take: its bytes, if in FP8."""
    return cache.view(torch.uint8) if cache.dtype == FP8 else cache


def full_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention without a mask: each of `query` `[N, T, H, D]` sees all keys of its own of the N.

    Keys and values are `[N, L, K, D]`, where K divides H: head h reads those of head h * K // H.
    Returns `[N, T, H, D]`. Scores are the products times `scale`.

    Raises:
        ValueError, RuntimeError: the shapes don't fit.
    """
    groups = query.shape[2] // key.shape[2]
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    out = scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=groups > 1)
    return out.transpose(1, 2).contiguous()


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of `query` `[T, H, D]` over each sequence's own blocks; returns `[T, H, D]`.

    Sequence s owns `query_lens[s]` consecutive rows, the last of its `context_lens[s]` tokens,
    whose keys and values lie in the blocks of `block_tables[s]`. With a sliding window of w a
    token sees itself and the w - 1 before it. With a soft cap of c a score s becomes
    c * tanh(s / c) before it is masked (arXiv:2408.00118).
    """
    out = torch.empty_like(query)
    groups = query.shape[1] // key_cache.shape[2]
    start = 0
    for blocks, num_new, length in zip(block_tables, query_lens, context_lens, strict=True):
        keys, values = (
            indexable(cache)[blocks].view(cache.dtype).flatten(0, 1)[:length].float()
            for cache in (key_cache, value_cache)
        )
        keys, values = (x.repeat_interleave(groups, dim=1) for x in (keys, values))
        rows = query[start : start + num_new].float()
        scores = torch.einsum("thd,lhd->htl", rows, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        query_pos = torch.arange(length - num_new, length, device=query.device)[:, None]
        key_pos = torch.arange(length, device=query.device)[None, :]
        hidden = key_pos > query_pos
        if sliding_window is not None:
            hidden |= key_pos <= query_pos - sliding_window
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[start : start + num_new] = torch.einsum("htl,lhd->thd", probs, values).to(query.dtype)
        start += num_new
    return out


def paged_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    max_context_len: int,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_attention` of one query for each sequence: `[S, H, D]` to `[S, H, D]`.

    `context_lens` `[S]` lies on the device and is at most `max_context_len`; a row of length 0 is
    padding, and its output zeros. `num_splits` is for kernels that cut a context to pieces.
    """
    lens = context_lens.tolist()
    assert max(lens, default=0) <= max_context_len
    out = torch.zeros_like(query) if out is None else out.zero_()
    real = [i for i, length in enumerate(lens) if length]
    out[real] = paged_attention(
        query[real],
        key_cache,
        value_cache,
        block_tables[real],
        [1] * len(real),
        [lens[i] for i in real],
        scale,
        sliding_window,
        softcap,
    )
    return out


def paged_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    max_query_len: int,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_attention` with lengths on the device: `[T, H, D]` to `[T, H, D]`.

    Sequence s owns the rows from `query_starts[s]` below `query_starts[s + 1]` (`[S + 1]`), at
    most `max_query_len`. What stands in rows past the last sequence's is not said.
    """
    starts = query_starts.tolist()
    query_lens = [end - start for start, end in pairwise(starts)]
    assert max(query_lens, default=0) <= max_query_len
    out = torch.empty_like(query) if out is None else out
    out[: starts[-1]] = paged_attention(
        query[: starts[-1]],
        key_cache,
        value_cache,
        block_tables,
        query_lens,
        context_lens.tolist(),
        scale,
        sliding_window,
        softcap,
    )
    return out


def merge_by_position(embeddings: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Put `rows` `[N, hidden]` at `positions` `[N]` of `embeddings` `[T, hidden]`, in place."""
    return embeddings.index_copy_(0, positions, rows.to(embeddings.dtype))


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """One id for each row of `logits` `[N, V]` float32, by inverting its distribution; `[N]` int64.

    `uniform` `[N]` is below 1; `temperature` `[N]` above 0. `top_k` `[N]` of V, `top_p` `[N]` of 1
    and `min_p` `[N]` of 0 cut nothing. Logits may be -inf; such an id is never drawn, nor is one
    that was cut. In the order of ids, it is the first whose cumulative probability exceeds the
    draw.
    """
    probs = kept_probs(logits, temperature, top_k, top_p, min_p)
    # float64: over a large vocabulary float32 sums lose the tail.
    cumulative = probs.double().cumsum(-1)
    draw = uniform.double()[:, None] * cumulative[:, -1:]
    # `right`: the first id whose cumulative probability exceeds the draw, never one of zero.
    index = torch.searchsorted(cumulative, draw, right=True)
    last = (probs > 0).double().cumsum(-1).argmax(-1, keepdim=True)  # the last id not cut
    return torch.minimum(index, last).squeeze(1)


def kept_probs(
    logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor
) -> Tensor:
    """The distributions that `sample` draws from, zero where they are cut; not normalised again.

    `min_p` cuts what is below that share of the likeliest.
    """
    probs = (logits / temperature[:, None]).softmax(-1)
    if bool((top_k < logits.shape[1]).any()) or bool((top_p < 1.0).any()):
        probs = cut_top(probs, top_k, top_p[:, None])
    if bool((min_p > 0).any()):
        floor = probs.amax(-1, keepdim=True) * min_p[:, None]
        probs = probs.masked_fill(probs < floor, 0.0)
    return probs


def cut_top(probs: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Zero all but each row's `top_k` `[N]` likeliest, then all past mass `top_p` `[N, 1]` of them.

    The token that reaches the mass stays (nucleus sampling, arXiv:1904.09751); ties go to the
    lower id.
    """
    ordered, ids = probs.sort(dim=-1, descending=True, stable=True)
    ranks = torch.arange(probs.shape[1], device=probs.device)
    ordered = ordered.masked_fill(ranks >= top_k[:, None], 0.0)
    mass = ordered.cumsum(-1)
    # Mass before a token, as a share of what top_k left; the first token always stays.
    before = (mass - ordered) / mass[:, -1:]
    # Rounded sums reach 1 before the end: a row that isn't to be cut must be left alone.
    ordered = ordered.masked_fill((before >= top_p) & (ranks > 0) & (top_p < 1.0), 0.0)
    return torch.zeros_like(probs).scatter_(1, ids, ordered)
