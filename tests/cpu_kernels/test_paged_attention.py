"""Attention over the paged KV cache, against the same in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mm_engine_kernels import ops
from mm_engine_kernels.cpu import extension
from mm_engine_kernels.cpu.paged_attention import Plan, attend, paged_attention
from torch import Tensor

DTYPES = [torch.float32, torch.bfloat16]
EPS = {torch.float32: 1.2e-7, torch.bfloat16: 2.0**-8}
NAN = float("nan")
Mix = list[tuple[int, int]]  # (new tokens, tokens in all) of each sequence
#: A long decode, a fresh prompt, a chunk, and a decode of one block: all in one step.
ALL_KINDS: Mix = [(1, 700), (40, 40), (9, 300), (1, 3)]


class Step:
    """A step over blocks in random order, with NaN in every slot that was never written."""

    def __init__(
        self,
        mix: Mix,
        *,
        heads: tuple[int, int] = (4, 2),
        dim: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        random = torch.Generator().manual_seed(seed)

        def noise(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=random).to(dtype)

        num_heads, kv_heads = heads
        self.query_lens, self.context_lens = [n for n, _ in mix], [length for _, length in mix]
        needed = [-(-length // block_size) for length in self.context_lens]
        blocks = torch.randperm(sum(needed) + 2, generator=random).tolist()
        own = [[blocks.pop() for _ in range(num)] for num in needed]
        rows = [row + row[:1] * (max(needed) - len(row)) for row in own]
        self.block_tables = torch.tensor(rows, dtype=torch.int32)
        shape = (sum(needed) + 2, block_size, kv_heads, dim)
        self.keys, self.values = (torch.full(shape, NAN, dtype=dtype) for _ in range(2))
        self.slots = []
        for row, length in zip(own, self.context_lens, strict=True):
            places = torch.arange(length)
            slots = torch.tensor(row)[places // block_size] * block_size + places % block_size
            self.slots.append(slots)
            for cache in (self.keys, self.values):
                cache.view(-1, kv_heads, dim)[slots] = noise(length, kv_heads, dim)
        # The queries are a slice of one fused projection, as in the decoder.
        self.query = noise(sum(self.query_lens), num_heads + 2 * kv_heads, dim)[:, :num_heads]

    def run(
        self, scale: float = 0.3, window: int | None = None, softcap: float | None = None
    ) -> Tensor:
        return paged_attention(
            self.query,
            self.keys,
            self.values,
            self.block_tables,
            self.query_lens,
            self.context_lens,
            scale,
            window,
            softcap,
        )

    def exact(
        self, scale: float = 0.3, window: int | None = None, softcap: float | None = None
    ) -> tuple[Tensor, Tensor]:
        """What comes out in float64, and how far from it float32 may lead."""
        outs, bounds = [], []
        rows = self.query.double().split(self.query_lens)
        for query, slots in zip(rows, self.slots, strict=True):
            num, length, group = len(query), len(slots), query.shape[1] // self.keys.shape[2]
            keys, values = (
                cache.flatten(0, 1)[slots].double().repeat_interleave(group, dim=1)
                for cache in (self.keys, self.values)
            )
            scores = torch.einsum("thd,lhd->htl", query, keys) * scale
            sizes = torch.einsum("thd,lhd->htl", query.abs(), keys.abs()) * abs(scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
                sizes = sizes + softcap
            position, place = torch.arange(length - num, length)[:, None], torch.arange(length)
            hidden = place > position
            if window is not None:
                hidden |= place <= position - window
            probs = scores.masked_fill(hidden, -math.inf).softmax(-1)
            out = torch.einsum("htl,lhd->thd", probs, values)
            size = torch.einsum("htl,lhd->thd", probs, values.abs())
            # A score that is off by e makes its weight off by e of its size.
            wrong = 1e-6 + 1e-6 * sizes.masked_fill(hidden, 0).amax(-1).T[:, :, None]
            outs.append(out)
            bounds.append(size * wrong + out.abs() * EPS[self.query.dtype] + 1e-30)
        return torch.cat(outs), torch.cat(bounds)

    def check(
        self, scale: float = 0.3, window: int | None = None, softcap: float | None = None
    ) -> None:
        got = self.run(scale, window, softcap)
        exact, bound = self.exact(scale, window, softcap)
        assert got.dtype == self.query.dtype
        assert got.shape == self.query.shape
        assert bool(((got.double() - exact).abs() <= bound).all())


@st.composite
def mixes(draw: st.DrawFn) -> Mix:
    """Some sequences, most of them decodes; a length may be around the tiles' and ranges' edges."""
    lengths = st.integers(1, 40) | st.sampled_from([63, 64, 65, 127, 255, 256, 257, 320, 513])
    mix = []
    for length in draw(st.lists(lengths, min_size=1, max_size=4)):
        new = draw(st.sampled_from([1, 1, length]) | st.integers(1, length))
        mix.append((new, length))
    return mix


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=40)
@given(
    mix=mixes(),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 8) | st.sampled_from([13, 14, 70]),
    dim=st.sampled_from([1, 2, 7, 8, 16, 33, 40, 63, 64, 80, 96, 128, 256]),
    block_size=st.sampled_from([1, 3, 16, 64]),
    window=st.none() | st.integers(1, 300),
    softcap=st.none() | st.sampled_from([0.7, 30.0]),
    seed=st.integers(0, 1000),
)
def test_paged_attention(
    isa: str,
    threads: int,
    dtype: torch.dtype,
    mix: Mix,
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    step = Step(
        mix,
        heads=(kv_heads * group, kv_heads),
        dim=dim,
        block_size=block_size,
        dtype=dtype,
        seed=seed,
    )
    step.check(dim**-0.5, window, softcap)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_and_wide_tables(isa: str, dtype: torch.dtype) -> None:
    step = Step(ALL_KINDS, dim=24, dtype=dtype)
    exact, bound = step.exact()

    def check() -> None:
        assert bool(((step.run().double() - exact).abs() <= bound).all())

    step.block_tables = step.block_tables.long()
    check()
    step.block_tables = step.block_tables.T.contiguous().T  # a row's numbers lie apart
    check()
    # The layers of a cache may lie in one tensor, heads outermost; and starts are unaligned.
    step.keys = step.keys.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3)
    wide = torch.full((*step.values.shape[:3], 31), NAN, dtype=dtype)
    wide[..., 3:27] = step.values
    step.values = wide[..., 3:27]
    check()
    step.keys = step.keys.transpose(2, 3).contiguous().transpose(2, 3)
    step.query = step.query.transpose(1, 2).contiguous().transpose(1, 2)
    check()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_neighbours_and_threads_change_no_digit(isa: str, dtype: torch.dtype) -> None:
    step = Step(ALL_KINDS, heads=(14, 2), dim=64, dtype=dtype)
    before = extension.num_threads()
    outs = []
    for count in (1, 3):
        extension.set_num_threads(count)
        outs.append(step.run())
    extension.set_num_threads(before)
    assert torch.equal(*outs)
    first = 0
    whole = (step.query, step.block_tables, step.query_lens, step.context_lens)
    for i, (num, length) in enumerate(ALL_KINDS):
        step.query, step.block_tables = whole[0][first : first + num], whole[1][i : i + 1]
        step.query_lens, step.context_lens = [num], [length]
        assert torch.equal(step.run(), outs[0][first : first + num])
        first += num


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [NAN, math.inf])
def test_nan_and_infinity_reach_who_sees_them_and_nobody_else(
    isa: str, dtype: torch.dtype, bad: float
) -> None:
    step = Step([(1, 300), (30, 90), (1, 20)], dtype=dtype)
    step.keys.flatten(0, 1)[step.slots[0][280], 0] = bad
    step.values.flatten(0, 1)[step.slots[1][59], 1, 3] = bad
    got, (exact, bound) = step.run(), step.exact()
    assert bool(got[0, :2].isnan().all())  # their scores are NaN: inf - inf, or 0 * inf
    assert not got[0, 2:].isnan().any()
    assert not got[1:, :2].isnan().any()
    seen = got[1:31, 2:, 3]
    assert bool((seen.isnan() | seen.isinf()).all())
    assert not got[31].isnan().any()
    real = exact.isfinite() & bound.isfinite()
    assert bool(((got.double() - exact).abs() <= bound)[real].all())


@pytest.mark.parametrize("mix", [[(1, 400)], [(70, 130)]], ids=["decode", "prefill"])
def test_scores_of_minus_infinity_weigh_nothing(isa: str, mix: Mix) -> None:
    step = Step(mix)
    step.query[:] = step.query.abs() + 0.1
    keys = step.keys.flatten(0, 1)
    keys[step.slots[0][:330:2]] = -math.inf  # among them the whole of the first range's even ones
    keys[step.slots[0][:61]] = -math.inf
    got, (exact, _) = step.run(), step.exact()
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert got.isfinite().any()


def test_large_scores_neither_overflow_nor_vanish(isa: str) -> None:
    step = Step(ALL_KINDS)
    for scale in (1e3, 1e30, -2.0, 0.0):
        got, (exact, _) = step.run(scale), step.exact(scale)
        # Among such scores only the largest counts, but for ties of float32.
        close = (got.double() - exact).abs() < 1e-2
        assert bool(got.isfinite().all())
        assert close.double().mean() > 0.95


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decodes_with_rows_of_padding(isa: str, threads: int, dtype: torch.dtype) -> None:
    step = Step([(1, 500), (1, 7), (1, 1)], dtype=dtype)
    out = torch.full(step.query.shape, NAN, dtype=dtype)
    plan = Plan.of_lens(step.block_tables, [1, 1, 1], [500, 0, 1])
    got = attend(step.query, step.keys, step.values, plan, 0.3, out=out)
    assert got is out
    expected = step.run()
    expected[1] = 0
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prefill_leaves_the_rows_of_padding(isa: str, dtype: torch.dtype) -> None:
    step = Step(ALL_KINDS, dtype=dtype)
    rows = len(step.query)
    plan = Plan.of_lens(step.block_tables, step.query_lens, step.context_lens)
    padded = torch.cat([step.query, torch.full_like(step.query[:3], NAN)])
    out = torch.full(padded.shape, 7.0, dtype=dtype)
    got = attend(padded, step.keys, step.values, plan, 0.3, out=out)
    assert bool((got[rows:] == 7.0).all())
    assert torch.equal(got[:rows], step.run())


def test_what_the_kernels_do_not_take_is_the_references() -> None:
    half = Step(ALL_KINDS, dtype=torch.float32)
    for cache in (half.keys, half.values):
        cache.nan_to_num_(0.0)
    expected = half.run()
    half.query, half.keys, half.values = half.query.half(), half.keys.half(), half.values.half()
    torch.testing.assert_close(half.run().float(), expected, rtol=0, atol=5e-3)


def test_lengths_that_do_not_fit_are_refused() -> None:
    step = Step([(2, 20)])
    step.query_lens = [3]
    with pytest.raises(ValueError, match="2 queries and blocks for 32 tokens don't fit"):
        step.run()
    step.query_lens, step.context_lens = [2], [33]
    with pytest.raises(ValueError, match="don't fit"):
        step.run()
    step.context_lens, step.block_tables = [20], step.block_tables.float()
    with pytest.raises(ValueError, match="int32 or int64, not torch.float32"):
        step.run()


def test_the_ops_of_a_cpu_are_these() -> None:
    assert ops._kernels["cpu"].paged_attention is paged_attention
