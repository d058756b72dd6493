"""Random lives of the engine. `CheckingRunner` holds every step to the promises."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mm_engine.engine.pace import Pace
from mm_engine.errors import RequestError
from mm_engine.sequence import UNKNOWN_TOKEN

TIMES = [(1, 1.0), (4, 1.5), (8, 4.0)]  # tokens in a step, seconds
LENGTHS = {"a": 1, "b": 3, "c": 5, "d": 8}  # tokens of each image


@dataclass(frozen=True)
class Arrival:
    parts: list[int | str]
    max_tokens: int
    n: int
    at: int  # step
    abort_after: int | None  # steps later
    abort_in_step: bool  # between schedule and process
    salt: str
    priority: int
    ignore_eos: bool


@dataclass(frozen=True)
class Sizes:
    num_blocks: int
    block_size: int
    max_num_batched_tokens: int
    max_num_seqs: int
    max_rows: int
    enable_prefix_caching: bool
    max_decode_slowdown: float | None
    num_speculative_tokens: int
    overlaps: bool


parts = st.lists(
    st.one_of(st.integers(1, 9), st.sampled_from(sorted(LENGTHS))), min_size=1, max_size=5
)
arrivals = st.builds(
    Arrival,
    parts=parts,
    max_tokens=st.integers(1, 20),
    n=st.integers(1, 3),
    at=st.integers(0, 15),
    abort_after=st.one_of(st.none(), st.none(), st.integers(0, 12)),
    abort_in_step=st.booleans(),
    salt=st.sampled_from(["", "", "mine"]),
    priority=st.sampled_from([0, 0, 0, -1, 5]),
    ignore_eos=st.booleans(),
)
sizes = st.builds(
    Sizes,
    num_blocks=st.integers(1, 24),
    block_size=st.integers(1, 5),
    max_num_batched_tokens=st.integers(1, 12),
    max_num_seqs=st.integers(1, 5),
    max_rows=st.integers(4, 14),
    enable_prefix_caching=st.booleans(),
    max_decode_slowdown=st.sampled_from([None, 1.1, 2.0, 4.0]),
    num_speculative_tokens=st.integers(0, 5),
    overlaps=st.booleans(),
)


@settings(max_examples=400)
@given(st.lists(arrivals, min_size=1, max_size=8), sizes, st.sampled_from([1, 2, 20]))
def test_every_request_ends_as_it_would_alone(
    new_engine, new_request, expected, check_blocks, arrived: list[Arrival], sizes: Sizes, vocab
) -> None:
    engine, runner = new_engine(
        num_blocks=sizes.num_blocks,
        vocab=vocab,  # the fewer letters, the oftener is a draft right
        num_speculative_tokens=0 if sizes.overlaps else sizes.num_speculative_tokens,
        async_scheduling=sizes.overlaps,
        prompt_lookup_min=1,
        max_rows=sizes.max_rows,
        block_size=sizes.block_size,
        max_num_batched_tokens=sizes.max_num_batched_tokens,
        max_num_seqs=sizes.max_num_seqs,
        enable_prefix_caching=sizes.enable_prefix_caching,
        pace=sizes.max_decode_slowdown and Pace(TIMES, sizes.max_decode_slowdown),
    )
    requests = {
        f"r{i}": new_request(
            f"r{i}",
            arrival.parts,
            lengths=LENGTHS,
            salt=arrival.salt,
            priority=arrival.priority,
            max_tokens=arrival.max_tokens,
            n=arrival.n,
            ignore_eos=arrival.ignore_eos,
        )
        for i, arrival in enumerate(arrived)
    }
    by_id = dict(zip(requests, arrived, strict=True))
    sums, refused, known, sequences = {}, set(), {}, []
    step = 0
    while engine.has_work or step <= 15:
        for request_id, arrival in by_id.items():
            if arrival.at == step:
                try:
                    engine.add(requests[request_id])
                    sequences += engine._answers[request_id].sequences
                except RequestError:
                    refused.add(request_id)
        leaving = [
            request_id
            for request_id, arrival in by_id.items()
            if arrival.abort_after is not None and arrival.at + arrival.abort_after == step
        ]
        in_step = [request_id for request_id in leaving if by_id[request_id].abort_in_step]
        for request_id in set(leaving) - set(in_step):
            engine.abort(request_id)
        runner.after_run = lambda ids=in_step: [engine.abort(i) for i in ids]
        for output in engine.step():
            assert output.error is None
            assert all(UNKNOWN_TOKEN not in new.token_ids for new in output.outputs)
            if output.request_id in sums:
                assert not sums[output.request_id].finished, "news after the end"
                sums[output.request_id].extend(output)
            else:
                sums[output.request_id] = output
        assert all(waits.num_computed_tokens == 0 for waits in engine.scheduler.waiting)
        check_blocks(engine, runner, known, sequences)
        step += 1
        assert step < 3000, "no end in sight"

    for request_id, request in requests.items():
        arrival = by_id[request_id]
        rows_fit = all(LENGTHS[part] <= sizes.max_rows for part in arrival.parts if part in LENGTHS)
        num_tokens = len(request.prompt_token_ids) + arrival.max_tokens
        fits = num_tokens <= sizes.num_blocks * sizes.block_size and rows_fit
        assert (request_id in refused) == (not fits)
        if request_id in refused:
            continue
        answer = sums[request_id]
        assert answer.finished
        assert [output.index for output in answer.outputs] == list(range(arrival.n))
        for output in answer.outputs:
            wanted = expected(request, output.index, runner.vocab)
            if output.finish_reason == "abort":
                assert arrival.abort_after is not None
                assert output.token_ids == wanted[: len(output.token_ids)]
            else:
                assert output.token_ids == wanted
    stats = engine.stats()
    assert stats.num_used_blocks == stats.num_running == stats.num_waiting == 0
    assert engine.kv_cache.num_free_blocks == sizes.num_blocks
    assert engine.encoder_cache.num_rows == sum(runner.features.values()) <= sizes.max_rows
    assert (stats.num_prefix_hits == 0) or sizes.enable_prefix_caching
    assert not runner.writes, "the result of each step was taken"
    ends = [new.finish_reason for answer in sums.values() for new in answer.outputs]
    assert runner.num_wasted <= (ends.count("stop") if sizes.overlaps else 0)
    event(f"wasted tokens: {min(runner.num_wasted, 1)} (overlaps: {sizes.overlaps})")
    event(f"waited for a result: {runner.num_waits > 1} (overlaps: {sizes.overlaps})")
    event(f"found in the cache: {stats.num_prefix_hits > 0}")
    event(f"evicted: {engine.kv_cache.num_evictions > 0}")
    event(f"preempted: {stats.num_preemptions > 0}")
    event(f"mixed: {runner.num_mixed_steps > 0}")
    event(f"cut inside an image: {runner.num_cut_items > 0}")
    assert not runner.begun
    event(f"encoded in slices: {runner.num_slices > 0}")
    assert stats.num_accepted_tokens <= stats.num_draft_tokens
    assert stats.num_draft_tokens <= stats.num_drafts * sizes.num_speculative_tokens
    event(f"drafts accepted: {stats.num_accepted_tokens > 0}")
    event(f"drafts rejected: {stats.num_accepted_tokens < stats.num_draft_tokens}")
    event(f"encoded again: {len(set(runner.encoded)) < len(runner.encoded)}")


@pytest.mark.parametrize("num_speculative_tokens", [0, 3])
@pytest.mark.parametrize("reuses", [False, True])
@pytest.mark.parametrize("num_blocks", [14, 80])
def test_the_paths_of_the_property_are_really_taken(
    new_engine, new_request, run_all, num_blocks: int, reuses: bool, num_speculative_tokens: int
) -> None:
    engine, runner = new_engine(
        num_blocks=num_blocks,
        block_size=2,
        max_num_batched_tokens=6,
        max_rows=8,
        enable_prefix_caching=reuses,
        vocab=2,
        num_speculative_tokens=num_speculative_tokens,
        prompt_lookup_min=1,
    )
    for i in range(6):
        parts = [2, "abcd"[i % 4], 3]
        engine.add(new_request(f"r{i}", parts, lengths=LENGTHS, max_tokens=12, ignore_eos=True))
    run_all(engine)
    assert (engine.stats().num_preemptions > 0) == (num_blocks == 14)
    assert runner.num_mixed_steps > 0
    assert runner.num_cut_items > 0
    assert engine.stats().num_encodes == len(runner.encoded) >= 4
    accepted, drafted = engine.stats().num_accepted_tokens, engine.stats().num_draft_tokens
    assert 0 < accepted < drafted if num_speculative_tokens else drafted == 0
    assert (engine.stats().num_prefix_hits > 0) == reuses
    assert (engine.kv_cache.num_evictions > 0) == (reuses and num_blocks == 14)
