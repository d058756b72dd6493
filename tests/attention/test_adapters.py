"""What we pass to flash-attn and to PyTorch's varlen_attn means what the reference computes.

Neither runs without a card. In their place stand functions with their signatures that refuse what
their kernels refuse, and compute from the arguments by the reference. So this holds our side of the
call; the kernels are held to the reference by test_backends.py, on a card.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from mm_engine_kernels import reference
from packaging.version import Version
from torch import Tensor

from attention_steps import MIXES, Step, assert_meets_reference, make_step
from mm_engine.attention.backend import AttentionBackend
from mm_engine.attention.flash_attn import FlashAttention
from mm_engine.attention.torch_varlen import VarlenAttention

PAGE = 256
Calls = list[str]


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


@pytest.fixture
def calls() -> Calls:
    """The names of the functions that were called."""
    return []


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> FlashAttention:
    package = ModuleType("flash_attn")
    for function in (flash_attn_varlen_func, flash_attn_with_kvcache):
        setattr(package, function.__name__, noting(function, calls))
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    return FlashAttention()


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch, calls: Calls) -> VarlenAttention:
    from torch.nn.attention import varlen as module

    signature = inspect.signature(module.varlen_attn)  # the real one
    if Version(torch.__version__) < Version("2.13"):
        pytest.skip("varlen_attn reads no paged cache before torch 2.13, and is never chosen then")

    def varlen_attn(*args: Any, **kwargs: Any) -> Tensor:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        calls.append("varlen_attn")
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

    monkeypatch.setattr(module, "varlen_attn", varlen_attn)
    return VarlenAttention()


@pytest.fixture(params=["flash", "varlen"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return request.getfixturevalue(request.param)


def noting(function: Callable[..., Tensor], calls: Calls) -> Callable[..., Tensor]:
    def noted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(function.__name__)
        return function(*args, **kwargs)

    return noted


def make(backend: AttentionBackend, mix: list[tuple[int, int]], **options: Any) -> Step:
    given = {"dtype": torch.bfloat16, "block_size": PAGE, "garbage": float("nan"), **options}
    return make_step(mix, backend=backend, **given)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("window", [None, 1, 4, 24, 1000], ids=lambda w: f"window{w}")
def test_every_mix_and_window(
    backend: AttentionBackend, mix: list[tuple[int, int]], window: int | None
) -> None:
    assert_meets_reference(make(backend, mix, window=window), 0.0)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (7, 1), (8, 1)], ids=lambda h: f"{h[0]}x{h[1]}")
@pytest.mark.parametrize("head_dim", [64, 80, 256])
def test_every_ratio_of_heads(
    backend: AttentionBackend, heads: tuple[int, int], head_dim: int
) -> None:
    for mix in (MIXES["decodes"], MIXES["chunks"]):
        assert_meets_reference(make(backend, mix, heads=heads, head_dim=head_dim), 0.0)


def test_a_scale_of_the_models_own(backend: AttentionBackend) -> None:
    for mix in (MIXES["decodes"], MIXES["chunks"]):
        step = make(backend, mix)
        step.layer.scale = 0.02
        assert_meets_reference(step, 0.0)


def test_contexts_of_several_blocks(backend: AttentionBackend) -> None:
    assert_meets_reference(make(backend, [(1, 600), (1, 256), (1, 257)]), 0.0)
    assert_meets_reference(make(backend, [(1, 600), (300, 512), (3, 3)]), 0.0)


@pytest.mark.parametrize("window", [None, 4], ids=lambda w: f"window{w}")
def test_flash_attn_gets_the_soft_cap(flash: FlashAttention, window: int | None) -> None:
    for mix in (MIXES["decodes"], MIXES["chunks"]):
        assert_meets_reference(make(flash, mix, softcap=0.7, window=window), 0.0)


def test_flash_attn_has_a_function_of_its_own_for_steps_of_decodes(
    flash: FlashAttention, calls: Calls
) -> None:
    make(flash, MIXES["decodes"]).run()
    assert calls == ["flash_attn_with_kvcache"]
    make(flash, MIXES["all-kinds"]).run()
    assert calls[1:] == ["flash_attn_varlen_func"]


def test_where_contexts_begin_is_computed_once_a_step(flash: FlashAttention) -> None:
    step = make(flash, MIXES["chunks"])
    step.run()
    (starts,) = step.metadata.plan.values()
    step.run()
    assert next(iter(step.metadata.plan.values())) is starts
    decodes = make(flash, MIXES["decodes"])
    decodes.run()
    assert not decodes.metadata.plan  # a captured graph would replay one step's numbers


def test_lists_on_the_host_are_not_read(backend: AttentionBackend) -> None:
    for mix in (MIXES["decodes"], MIXES["chunks"]):
        plain, step = make(backend, mix).run(), make(backend, mix)
        step.metadata.query_lens, step.metadata.context_lens = [], []
        step.metadata.max_context_len += 1000
        assert torch.equal(step.run(), plain)


def test_flash_attn_passes_over_rows_of_padding(flash: FlashAttention) -> None:
    plain, padded = (make(flash, MIXES["decodes"], garbage=3.0) for _ in range(2))
    padded.metadata.slot_mapping[2:] = -1
    padded.metadata.contexts[2:] = 0
    before = [cache.clone() for cache in padded.metadata.kv_caches[1]]
    assert torch.equal(padded.run()[:2], plain.run()[:2])
    written = {int(slot) for slot in padded.metadata.slot_mapping[:2]}
    for was, cache in zip(before, padded.metadata.kv_caches[1], strict=True):
        changed = (cache != was).any(-1).any(-1).flatten().nonzero().flatten().tolist()
        assert set(changed) == written


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="flash-attn isn't installed"
)
def test_the_recorded_signatures_are_those_of_the_package() -> None:
    import flash_attn

    for ours in (flash_attn_varlen_func, flash_attn_with_kvcache):
        theirs = inspect.signature(getattr(flash_attn, ours.__name__)).parameters
        assert list(inspect.signature(ours).parameters) == list(theirs)
