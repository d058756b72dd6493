"""What we pass to flash-attn and to PyTorch's varlen_attn means what the reference computes.

Neither runs without a card: `flash_stand_ins` are in their place. So this holds our side of the
call; the kernels are held to the reference by test_backends.py, on a card.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from attention_steps import MIXES, Step, assert_meets_reference, make_step
from flash_stand_ins import (
    PAGE,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    standing_in,
)
from mm_engine.attention.backend import AttentionBackend
from mm_engine.attention.flash_attn import FlashAttention
from mm_engine.attention.torch_varlen import VarlenAttention

Calls = list[str]


@pytest.fixture
def calls() -> Calls:
    """The names of the functions that were called."""
    return []


@pytest.fixture
def stand_ins(calls: Calls) -> Iterator[None]:
    def noting(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(function)
        def noted(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(function.__name__)
            return function(*args, **kwargs)

        return noted

    with standing_in(noting):
        yield


@pytest.fixture
def flash(stand_ins: None) -> FlashAttention:
    return FlashAttention()


@pytest.fixture
def varlen(stand_ins: None) -> VarlenAttention:
    if Version(torch.__version__) < Version("2.13"):
        pytest.skip("varlen_attn reads no paged cache before torch 2.13, and is never chosen then")
    return VarlenAttention()


@pytest.fixture(params=["flash", "varlen"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    return request.getfixturevalue(request.param)


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
