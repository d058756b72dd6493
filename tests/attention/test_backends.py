"""Every backend that this machine can run gives what the reference gives.

On a card, those that need one run there; without one, Triton runs under its interpreter, and what
is passed to flash-attn and varlen_attn is held to the reference in test_adapters.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from attention_steps import MIXES, Step, assert_meets_reference, make_step
from mm_engine.attention.backend import AttentionBackend, Needs
from mm_engine.attention.select import BACKENDS

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPABILITY = torch.cuda.get_device_capability() if DEVICE.type == "cuda" else None
FEW = [(1, 20), (5, 5), (3, 18)]  # a decode, a fresh prompt and a chunk
DECODES = [(1, 18), (1, 2), (1, 16)]

ANYTHING = Needs([], DEVICE, torch.bfloat16, torch.bfloat16, 256, CAPABILITY)
REASONS = {kind: kind.unfit(ANYTHING) for kind in BACKENDS}


@pytest.fixture(
    scope="module",
    params=[kind for kind in BACKENDS if REASONS[kind] is None],
    ids=lambda kind: kind.name,
)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    kind: type[AttentionBackend] = request.param
    return kind()


@pytest.mark.parametrize("kind", BACKENDS, ids=lambda kind: kind.name)
def test_it_runs_here(kind: type[AttentionBackend]) -> None:
    """Skipped once for each backend that all other tests here leave out, with what is missing."""
    if REASONS[kind] is not None:
        pytest.skip(f"{kind.name} {REASONS[kind]}")
    assert kind().name == kind.name


def make(backend: AttentionBackend, mix: list[tuple[int, int]], **options: Any) -> Step:
    """A step on this machine's device, in a dtype that the backend takes."""
    halves_only = backend.name in ("flash-attn", "varlen")
    given = {
        "dtype": torch.bfloat16 if halves_only else torch.float32,
        "block_size": max(16, backend.block_multiple),
        **options,
    }
    step = make_step(mix, backend=backend, device=DEVICE, **given)
    reason = type(backend).unfit(step.needs)
    if reason is not None:
        pytest.skip(f"{backend.name} {reason}")
    return step


def check(backend: AttentionBackend, mix: list[tuple[int, int]], **options: Any) -> None:
    step = make(backend, mix, **options)
    # A card multiplies float32 in parts, and halves round what is summed up.
    tolerance = 2e-2 if step.query.dtype != torch.float32 else 2e-3 if CAPABILITY else 2e-5
    assert_meets_reference(step, tolerance)


@pytest.mark.parametrize("mix", MIXES.values(), ids=MIXES)
def test_every_mix(backend: AttentionBackend, mix: list[tuple[int, int]]) -> None:
    check(backend, mix)


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (7, 1), (16, 2)], ids=lambda h: f"{h[0]}x{h[1]}")
@pytest.mark.parametrize("mix", [DECODES, FEW], ids=["decodes", "few"])
def test_every_ratio_of_heads(
    backend: AttentionBackend, heads: tuple[int, int], mix: list[tuple[int, int]]
) -> None:
    check(backend, mix, heads=heads)


@pytest.mark.parametrize("head_dim", [1, 24, 60, 63, 64, 80, 96, 128, 256], ids=lambda d: f"d{d}")
@pytest.mark.parametrize("mix", [DECODES, FEW], ids=["decodes", "few"])
def test_every_head_size(
    backend: AttentionBackend, head_dim: int, mix: list[tuple[int, int]]
) -> None:
    check(backend, mix, head_dim=head_dim)


@pytest.mark.parametrize("block_size", [1, 3, 16, 256], ids=lambda b: f"block{b}")
@pytest.mark.parametrize("mix", [DECODES, FEW], ids=["decodes", "few"])
def test_every_block_size(
    backend: AttentionBackend, block_size: int, mix: list[tuple[int, int]]
) -> None:
    if block_size % backend.block_multiple:
        pytest.skip(f"{backend.name} takes blocks of multiples of {backend.block_multiple}")
    check(backend, mix, block_size=block_size)


@pytest.mark.parametrize(
    ("window", "softcap"),
    [(1, None), (4, None), (24, None), (1000, None), (1, 0.7), (4, 30.0), (1000, 0.7)],
)
@pytest.mark.parametrize("mix", [DECODES, FEW], ids=["decodes", "few"])
def test_every_window_with_and_without_a_soft_cap(
    backend: AttentionBackend, window: int, softcap: float | None, mix: list[tuple[int, int]]
) -> None:
    check(backend, mix, window=window, softcap=softcap)


def test_a_soft_cap_alone(backend: AttentionBackend) -> None:
    check(backend, DECODES, softcap=0.7)
    check(backend, FEW, softcap=0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mix", [DECODES, FEW], ids=["decodes", "few"])
def test_halves(backend: AttentionBackend, dtype: torch.dtype, mix: list[tuple[int, int]]) -> None:
    check(backend, mix, dtype=dtype, garbage=100.0)


def test_a_context_of_many_blocks(backend: AttentionBackend) -> None:
    mix = [(1, 260), (1, 1), (1, 400)]
    check(backend, mix, head_dim=16, heads=(2, 1))
    check(backend, [(1, 260), (3, 300)], head_dim=16, heads=(2, 1))


def test_what_lies_in_unwritten_slots_does_not_matter(backend: AttentionBackend) -> None:
    # PyTorch's operators read what they mask, so the worker keeps numbers there.
    garbage = 3e4 if backend.name == "torch" else float("nan")
    for mix in (DECODES, FEW):
        check(backend, mix, garbage=garbage)


def test_layers_of_a_step_may_differ_in_window(backend: AttentionBackend) -> None:
    step = make(backend, FEW, window=6)
    tolerance = 2e-2 if CAPABILITY else 2e-5
    assert_meets_reference(step, tolerance)
    step.layer.sliding_window = None  # what is made once a step mustn't know the window
    assert_meets_reference(step, tolerance)


@pytest.mark.parametrize("mix", [DECODES, FEW], ids=["decodes", "few"])
def test_a_backend_that_captures_reads_no_list_and_takes_upper_bounds(
    backend: AttentionBackend, mix: list[tuple[int, int]]
) -> None:
    if not backend.captures:
        pytest.skip(f"{backend.name} isn't captured here")
    plain = make(backend, mix).run()
    step = make(backend, mix)
    step.metadata.query_lens, step.metadata.context_lens = [], []
    step.metadata.max_context_len += 200
    if step.metadata.max_query_len > 1:
        step.metadata.max_query_len += 30
    torch.testing.assert_close(step.run(), plain, rtol=1e-2, atol=1e-3)


def test_a_backend_that_captures_passes_over_rows_of_padding(backend: AttentionBackend) -> None:
    if not backend.captures:
        pytest.skip(f"{backend.name} isn't captured here")
    plain, padded = make(backend, DECODES), make(backend, DECODES)
    meta = padded.metadata
    meta.slot_mapping[2:] = -1
    meta.contexts[2:] = 0
    before = [cache.clone() for cache in plain.metadata.kv_caches[1]]
    torch.testing.assert_close(padded.run()[:2], plain.run()[:2], rtol=1e-2, atol=1e-3)
    size = before[0].shape[1]
    written = {int(slot) for slot in meta.slot_mapping[:2]}
    for was, cache in zip(before, meta.kv_caches[1], strict=True):
        changed = (cache != was).any(-1).any(-1).nonzero().tolist()
        assert {block * size + offset for block, offset in changed} == written
