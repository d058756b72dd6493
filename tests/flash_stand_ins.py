"""In place of flash-attn and of PyTorch's varlen_attn, which don't run without a card.

They have the signatures of those, refuse what their kernels refuse, and compute from the arguments
by the reference: what is held to it is our side of the call.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from mm_engine_kernels import reference
from torch import Tensor

PAGE = 256
Stand = Callable[..., Tensor]


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """The signature of flash-attn 2.8."""
    lens = cu_seqlens_k.diff()
    assert cu_seqlens_k[0] == 0 and cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_k >= lens.max()
    assert causal
    assert softmax_scale is not None
    return by_reference(
        (q, k, v),
        cu_seqlens_q,
        max_seqlen_q,
        lens,
        block_table,
        softmax_scale,
        window_size,
        softcap,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: None = None,
    v: None = None,
    rotary_cos: None = None,
    rotary_sin: None = None,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: None = None,
    cache_leftpad: None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    """The signature of flash-attn 2.8; `k` and `v` would be written to the cache: we did that."""
    assert k is None and v is None
    assert num_splits == 0, "it knows better how many"
    assert cache_seqlens is not None and softmax_scale is not None
    assert q.dim() == 4 and q.shape[1] == 1
    starts = torch.arange(len(q) + 1, dtype=torch.int32)
    out = by_reference(
        (q.flatten(0, 1), k_cache, v_cache),
        starts,
        1,
        cache_seqlens,
        block_table,
        softmax_scale,
        window_size,
        softcap,
    )
    return out.unsqueeze(1)


def by_reference(
    tensors: tuple[Tensor, Tensor, Tensor],
    query_starts: Tensor,
    max_query_len: int,
    lens: Tensor,
    block_table: Tensor | None,
    scale: float,
    window_size: tuple[int, int],
    softcap: float,
) -> Tensor:
    """Refuse what FlashAttention-2's paged kernels refuse, then ask the reference."""
    query, keys, values = tensors
    assert block_table is not None
    for ints in (block_table, query_starts, lens):
        assert ints.dtype == torch.int32
    assert block_table.stride(-1) == 1 and query_starts.is_contiguous() and lens.is_contiguous()
    assert query.dtype in (torch.bfloat16, torch.float16)
    assert keys.dtype == values.dtype == query.dtype
    assert keys.shape[1] % PAGE == 0
    assert query.shape[-1] % 8 == 0 and query.shape[-1] <= 256
    assert query.stride(-1) == keys.stride(-1) == values.stride(-1) == 1
    left, right = window_size
    assert right <= 0  # what lies ahead is hidden anyway
    query_lens = query_starts.diff()
    assert query_starts[-1] == len(query)
    assert max_query_len >= query_lens.max()
    return reference.paged_attention(
        query,
        keys,
        values,
        block_table,
        query_lens.tolist(),
        lens.tolist(),
        scale,
        left + 1 if left >= 0 else None,
        softcap or None,
    )


def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
    """With the signature of the installed PyTorch's."""
    given = VARLEN.bind(*args, **kwargs)
    given.apply_defaults()
    asked = given.arguments
    assert asked["num_splits"] == 1  # others have been wrong with a paged cache
    assert asked["return_aux"] is None
    query, keys = asked["query"], asked["key"]
    assert asked["enable_gqa"] == (query.shape[1] != keys.shape[2])
    lens = asked["seqused_k"]
    assert torch.equal(asked["cu_seq_k"].diff(), lens) and asked["max_k"] >= lens.max()
    left, right = asked["window_size"]
    assert right == 0  # causal: it has no other word for it
    return by_reference(
        (query, keys, asked["value"]),
        asked["cu_seq_q"],
        asked["max_q"],
        lens,
        asked["block_table"],
        asked["scale"],
        (left, right),
        0.0,
    )


def _varlen_signature() -> inspect.Signature:
    from torch.nn.attention.varlen import varlen_attn

    return inspect.signature(varlen_attn)


VARLEN = _varlen_signature()
varlen_attn.__signature__ = VARLEN  # type: ignore[attr-defined]


@contextmanager
def standing_in(made: Callable[[Stand], Stand] = lambda function: function) -> Iterator[None]:
    """flash-attn is installed, and varlen_attn runs: by what `made` makes of these functions."""
    from torch.nn.attention import varlen

    package = ModuleType("flash_attn")
    for function in (flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(package, function.__name__, made(function))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "flash_attn", package)
        patch.setattr(varlen, "varlen_attn", made(varlen_attn))
        yield
