"""Chunks of prompts, and decodes beside them: the Triton kernel gives what the reference gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import reference

from paged import Paged

#: (new tokens, tokens in all) of each sequence in a step.
MIXES: dict[str, list[tuple[int, int]]] = {
    "one-token": [(1, 1)],
    "fresh-prompt": [(20, 20)],
    "chunk": [(5, 40)],
    "decodes": [(1, 30), (1, 2)],
    "all-kinds": [(1, 25), (6, 6), (19, 33), (1, 1)],
}


def assert_meets_reference(step: Paged, kernels: Any, *args: Any, **options: Any) -> None:
    got = step.prefill(kernels, *args, **options)
    torch.testing.assert_close(got, step.prefill(reference, *args), **step.tolerance)


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_mixes(mix: list[tuple[int, int]], block_size: int, kernels: Any, device: str) -> None:
    assert_meets_reference(Paged(mix, block_size=block_size, device=device), kernels)


@pytest.mark.parametrize("head_dim", [40, 60, 63, 64, 80, 96, 128, 256])
def test_head_sizes(head_dim: int, kernels: Any, device: str) -> None:
    step = Paged([(9, 30)], head_dim=head_dim, heads=(2, 1), device=device)
    assert_meets_reference(step, kernels)


@pytest.mark.parametrize("heads", [(4, 4), (7, 1), (14, 2), (71, 1)], ids=str)
def test_heads(heads: tuple[int, int], kernels: Any, device: str) -> None:
    assert_meets_reference(Paged([(9, 30), (1, 7)], heads=heads, device=device), kernels)


@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("window", [1, 16, 20, 1000])
def test_windows_and_soft_caps(
    window: int, softcap: float | None, kernels: Any, device: str
) -> None:
    step = Paged([(6, 6), (19, 50), (1, 40)], heads=(2, 1), device=device)
    assert_meets_reference(step, kernels, window, softcap)


@pytest.mark.parametrize("cache_dtype", [None, torch.float8_e4m3fn], ids=["own", "fp8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(
    dtype: torch.dtype, cache_dtype: torch.dtype | None, kernels: Any, device: str
) -> None:
    step = Paged(
        [(1, 25), (19, 33)], head_dim=64, dtype=dtype, cache_dtype=cache_dtype, device=device
    )
    assert_meets_reference(step, kernels)


def test_output_may_be_given_and_rows_past_the_sequences_are_left(
    kernels: Any, device: str
) -> None:
    step = Paged(MIXES["all-kinds"], device=device)
    num = len(step.query)
    step.query = torch.cat((step.query, step.query[:5]))  # padding
    out = torch.full((num + 5, 4, 24), 9.0, device=device)
    assert step.prefill(kernels, out=out).data_ptr() == out.data_ptr()
    torch.testing.assert_close(out[:num], step.prefill(reference)[:num], **step.tolerance)
    assert (out[num:] == 9.0).all()


@pytest.mark.parametrize(("rows", "block_size"), [(128, 16), (64, 64)])
def test_the_tiles_of_a_card_do_the_same(
    rows: int, block_size: int, kernels: Any, device: str
) -> None:
    from mm_engine_kernels.triton.paged_prefill import PrefillTiles

    step = Paged([(70, 150), (1, 64), (30, 30)], block_size=block_size, device=device)
    assert_meets_reference(step, kernels, tiles=PrefillTiles(rows, 64, 4, 1))


@settings(max_examples=10)
@given(data=st.data())
def test_any_mix(data: st.DataObject, kernels: Any, device: str) -> None:
    pairs = st.tuples(st.integers(0, 24), st.integers(0, 30)).filter(lambda p: p[0] or not p[1])
    mix = [(new, new + old) for new, old in data.draw(st.lists(pairs, min_size=1, max_size=4))]
    if not any(new for new, _ in mix):
        mix.append((1, 1))
    window = data.draw(st.none() | st.integers(1, 60))
    heads = data.draw(st.sampled_from([(1, 1), (3, 1), (4, 2)]))
    block_size = data.draw(st.sampled_from([1, 5, 16, 32]))
    step = Paged(mix, heads=heads, block_size=block_size, device=device)
    assert_meets_reference(step, kernels, window)
