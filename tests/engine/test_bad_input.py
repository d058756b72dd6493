"""Bad input among neighbours that share blocks and features with it: with all caches on.

Each test asks: does the bad one get one error, do its neighbours get the tokens that they get
without it, is everything given back, and can nothing of it be found?
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from mm_engine.engine.engine import Engine
from mm_engine.engine.fault_barrier import FaultBarrier
from mm_engine.errors import RequestError
from mm_engine.outputs import ErrorInfo, RequestOutput
from mm_engine.request import Request
from mm_engine.sequence import SampledToken, ScheduledBatch, StepResult
from sequences import AtOnce


@pytest.fixture(scope="module", params=[False, True], ids=["one-by-one", "overlapped"])
def overlaps(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


LENGTHS = {"a": 6, "b": 6, "c": 6, "d": 6, "big": 20}
NAN = ErrorInfo("PluginError", "compute_logits: got NaN")


def assert_nothing_left(engine: Engine, runner) -> None:
    cache, features, scheduler = engine.kv_cache, engine.encoder_cache, engine.scheduler
    assert not engine.has_work
    assert cache.num_free_blocks == cache.num_blocks and not any(cache._num_users)
    assert not scheduler.running and not scheduler.waiting and not scheduler.departures
    assert not features._num_pins and not features._pinned_by
    assert not engine._answers and not engine._changed
    # What is said to be kept is there, and no more.
    assert dict(features._rows) == runner.features
    assert features.num_rows == sum(runner.features.values()) <= features.max_rows
    assert len(set(cache._block_of_key.values())) == cache.num_kept_blocks


def assert_reused(engine: Engine) -> None:
    """The positive control: the caches were on, and served."""
    stats = engine.stats()
    assert stats.num_prefix_hits > 0 and stats.num_encoder_hits > 0


@pytest.fixture
def neighbours(new_request) -> list[Request]:
    """Two that begin with the same text and picture; the second finds all but its last token."""
    return [
        new_request(name, [3, "a", num], lengths=LENGTHS, max_tokens=9, ignore_eos=True)
        for name, num in (("N", 4), ("M", 1))
    ]


@pytest.fixture
def answers(expected) -> Callable[..., None]:
    """`answers(sums, requests, runner)`: each has the tokens that it must have."""

    def check(sums: dict[str, RequestOutput], requests: list[Request], runner) -> None:
        for request in requests:
            answer = sums[request.request_id]
            assert answer.finished and answer.error is None
            assert answer.outputs[0].token_ids == expected(request, 0, runner.vocab)

    return check


@pytest.mark.parametrize("kind", ["pool", "features", "id"])
@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
def test_what_can_never_run_is_refused_and_leaves_no_trace(
    new_engine, new_request, run_all, neighbours, answers, kind: str, num_steps: int
) -> None:
    """A request over the whole pool, an image over the whole encoder cache, an id in use."""
    engine, runner = new_engine(num_blocks=24, max_rows=12, max_num_batched_tokens=5)
    sums: dict[str, RequestOutput] = {}
    for request in neighbours:
        engine.add(request)
    run_all(engine, sums, num_steps=num_steps)
    bad, message = {
        "pool": (
            new_request("B", [3, "a", 4], lengths=LENGTHS, max_tokens=84),
            r"exceed the KV cache: 13 \+ 84 of 96 tokens",
        ),
        "features": (
            new_request("B", [3, "a", "big"], lengths=LENGTHS),
            "image 1 exceeds the encoder cache: 20 of 12 tokens",
        ),
        "id": (new_request("N", ["b", 30], lengths=LENGTHS, n=2), "request_id is in use: N"),
    }[kind]
    before = engine.stats(), dict(engine.kv_cache._block_of_key), len(engine._answers)
    with pytest.raises(RequestError, match=message):
        engine.add(bad)
    assert before == (engine.stats(), engine.kv_cache._block_of_key, len(engine._answers))
    run_all(engine, sums)
    answers(sums, neighbours, runner)
    assert sums.keys() == {"N", "M"}
    assert_reused(engine)
    assert_nothing_left(engine, runner)
    assert runner.encoded == ["a"]


@pytest.mark.parametrize("aborted", ["first", "second"])
@pytest.mark.parametrize("in_step", range(1, 9))
def test_an_abort_while_a_step_runs_spoils_nothing_that_is_shared(
    new_engine, new_request, run_all, neighbours, answers, overlaps, aborted: str, in_step: int
) -> None:
    """In one of the steps it is in the middle of the image that both have, in another it has
    computed a block that the other waits for, in others they decode behind the same blocks."""
    engine, runner = new_engine(max_num_batched_tokens=5, num_blocks=14, max_rows=12)
    gone = new_request("X", [3, "a", 8], lengths=LENGTHS, max_tokens=9, ignore_eos=True, n=2)
    order = [gone, *neighbours] if aborted == "first" else [neighbours[0], gone, neighbours[1]]
    for request in order:
        engine.add(request)
    sums: dict[str, RequestOutput] = {}
    run_all(engine, sums, num_steps=in_step - 1)
    runner.after_run = lambda: engine.abort("X")
    run_all(engine, sums, num_steps=1)
    runner.after_run = lambda: None
    assert {output.finish_reason for output in sums["X"].outputs} == {"abort"}
    run_all(engine, sums, num_steps=1 + overlaps)  # what is in flight holds its blocks
    assert all(seq.request is not gone for seq in engine.scheduler.running)
    assert all(seq.request is not gone for seq in engine.encoder_cache._pinned_by)
    in_use = {block for seq in engine.scheduler.running for block in seq.block_table}
    assert engine.stats().num_used_blocks == len(in_use)
    run_all(engine, sums)
    answers(sums, neighbours, runner)
    assert_reused(engine)
    assert_nothing_left(engine, runner)


@pytest.mark.parametrize("notify", [True, False])
def test_features_that_fail_in_the_step_of_an_abort_are_made_again(
    new_engine, new_request, run_all, neighbours, answers, notify: bool
) -> None:
    """The one to blame has left when the step's result comes; the image is not there."""
    engine, runner = new_engine()
    runner.bad_items["b"] = NAN
    for request in (new_request("X", [3, "b"], lengths=LENGTHS), *neighbours):
        engine.add(request)
    runner.after_run = lambda: engine.abort("X", notify=notify)
    sums: dict[str, RequestOutput] = {}
    run_all(engine, sums, num_steps=1)
    runner.after_run = lambda: None
    assert ("X" in sums) == notify
    if notify:
        assert sums["X"].error is None and sums["X"].outputs[0].finish_reason == "abort"
    run_all(engine, sums)
    runner.bad_items.clear()
    again = new_request("Y", [3, "b", 5], lengths=LENGTHS)
    engine.add(again)
    run_all(engine, sums)
    answers(sums, [*neighbours, again], runner)
    assert runner.encoded == ["a", "b"]
    assert_reused(engine)
    assert_nothing_left(engine, runner)


def nan_at(runner, request_id: str, num_computed: int) -> None:
    """Have the runner find NaN in this request's row once so many of its tokens are computed."""
    run, runner.late = runner.run, NAN

    def broken(batch: ScheduledBatch) -> StepResult:
        result = run(batch)
        tokens = [
            SampledToken(error=NAN)
            if share.sequence.request.request_id == request_id and share.end >= num_computed
            else token
            for share, token in zip(batch.sequences, result.tokens, strict=True)
        ]
        return replace(result, tokens=tokens)

    runner.run = broken


@pytest.mark.parametrize("num_computed", [4, 8, 12, 16, 20])
def test_blocks_in_whose_step_nan_came_are_never_found(
    new_engine, new_request, run_all, neighbours, answers, num_computed: int
) -> None:
    """NaN comes with the token that makes a block full: in the prompt, and in decode."""
    engine, runner = new_engine(max_num_batched_tokens=4, num_blocks=40)
    healthy = runner.run
    sick = new_request("X", [3, "a", 5], lengths=LENGTHS, max_tokens=12, ignore_eos=True)
    nan_at(runner, "X", num_computed)
    sums: dict[str, RequestOutput] = {}
    engine.add(sick)
    run_all(engine, sums)
    assert sums["X"].finished and sums["X"].error == NAN
    kept = engine.stats().num_kept_blocks
    assert kept == (num_computed - 1) // 4, "what was whole before, and nothing of that step"
    runner.run = healthy
    again = new_request("Y", [3, "a", 5], lengths=LENGTHS, max_tokens=12, ignore_eos=True)
    for request in (again, *neighbours):
        engine.add(request)
    run_all(engine, sums)
    assert sums["Y"].num_cached_tokens == min(kept, 3) * 4  # 14 tokens of prompt
    answers(sums, [again, *neighbours], runner)
    assert_reused(engine)
    assert_nothing_left(engine, runner)


def test_nan_beside_one_that_shares_its_blocks_is_one_error(
    new_engine, new_request, run_all, neighbours, answers
) -> None:
    engine, runner = new_engine(num_blocks=24)
    sick = new_request("X", [3, "a", 8], lengths=LENGTHS, max_tokens=9, ignore_eos=True)
    sums: dict[str, RequestOutput] = {}
    for request in (neighbours[0], sick, neighbours[1]):
        engine.add(request)
    run_all(engine, sums, num_steps=3)
    shared = set.intersection(*(set(seq.block_table) for seq in engine.scheduler.running))
    assert len(engine.scheduler.running) == 3 and len(shared) >= 2
    nan_at(runner, "X", 0)
    run_all(engine, sums)
    assert sums["X"].error == NAN
    answers(sums, neighbours, runner)
    assert_reused(engine)
    assert_nothing_left(engine, runner)


class Watched:
    """Notes in every step how full the caches are and who waits."""

    def __init__(self, engine: Engine, runner) -> None:
        self.num_steps_without_rows = 0  # all pinned, and somebody in the queue or without a share
        self.num_steps_without_blocks = 0  # all in use and findable or shared, and somebody waits
        self._engine, self._runner, self._run = engine, runner, runner.run
        runner.run = self.run

    def run(self, batch: ScheduledBatch) -> StepResult:
        features, cache = self._engine.encoder_cache, self._engine.kv_cache
        scheduler = self._engine.scheduler
        pinned = sum(features._rows[key] for key in features._num_pins)
        left_out = len(scheduler.running) - len(batch.sequences) + len(scheduler.waiting)
        room = batch.num_tokens < self._engine.scheduler.max_num_batched_tokens
        self.num_steps_without_rows += pinned == features.max_rows and room and left_out > 0
        shares = sum(users > 1 for users in cache._num_users)
        full = not cache.num_free_blocks and shares > 0
        self.num_steps_without_blocks += full and left_out > 0
        return self._run(batch)


def test_features_that_are_all_pinned_are_waited_for_not_for_ever(
    new_engine, new_request, run_all, answers
) -> None:
    """Two images fill the encoder cache, five sequences want one each. With 12 tokens a step the
    second is left in the middle of its image, and keeps that pinned; the third pins its own, and
    the fourth finds no room, though the step has.
    """
    engine, runner = new_engine(max_rows=12, max_num_batched_tokens=12, num_blocks=60)
    watched = Watched(engine, runner)
    names = ["a", "b", "c", "d", "a"]
    requests = [
        new_request(f"{i}{name}", [name, 1], lengths=LENGTHS, max_tokens=30, ignore_eos=True)
        for i, name in enumerate(names)
    ]
    sums: dict[str, RequestOutput] = {}
    for request in requests:
        engine.add(request)
    while not watched.num_steps_without_rows:
        assert engine.has_work, "the cache was never full of pinned features"
        run_all(engine, sums, num_steps=1)
    run_all(engine, sums, max_steps=40)  # nobody waits until another's answer is through
    answers(sums, requests, runner)
    assert all(output.finished for output in sums.values()) and len(sums) == len(requests)
    assert runner.num_cut_items > 0
    assert_nothing_left(engine, runner)


def test_who_leaves_in_the_middle_of_an_image_lets_others_in(
    new_engine, new_request, run_all, answers
) -> None:
    """The encoder cache holds one image: that of a sequence which is aborted inside it."""
    engine, runner = new_engine(max_rows=6, max_num_batched_tokens=4)
    requests = [new_request(name, [name, 5], lengths=LENGTHS) for name in "abc"]
    sums: dict[str, RequestOutput] = {}
    for request in requests:
        engine.add(request)
    run_all(engine, sums, num_steps=1)
    assert engine.encoder_cache._num_pins == {"a": 1}
    engine.abort("a")
    run_all(engine, sums, max_steps=20)
    answers(sums, requests[1:], runner)
    assert_nothing_left(engine, runner)


@pytest.mark.parametrize("abort", [False, True])
def test_blocks_that_are_all_in_use_are_waited_for_not_for_ever(
    new_engine, new_request, run_all, answers, abort: bool
) -> None:
    """What runs shares its beginning and holds the whole pool, so nothing that is kept can be
    evicted; those who wait want the same beginning, or another."""
    engine, runner = new_engine(num_blocks=12, block_size=2, max_rows=12)
    watched = Watched(engine, runner)
    requests = [
        new_request(f"{i}", [3, name, 2 + i % 3], lengths=LENGTHS, max_tokens=8, ignore_eos=True)
        for i, name in enumerate(["a", "a", "a", "b", "a", "b", "a"])
    ]
    sums: dict[str, RequestOutput] = {}
    for request in requests:
        engine.add(request)
    while not watched.num_steps_without_blocks:
        assert engine.has_work, "the pool was never full of blocks in use"
        run_all(engine, sums, num_steps=1)
    if abort:
        engine.abort("0")
    run_all(engine, sums)
    answers(sums, requests[abort:], runner)
    assert all(output.finished for output in sums.values()) and len(sums) == len(requests)
    assert_reused(engine)
    assert_nothing_left(engine, runner)


def test_a_step_of_nobody_that_fails_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    class Failing(AtOnce):
        def run(self, batch: ScheduledBatch) -> StepResult:
            raise ValueError

    assert FaultBarrier(Failing()).launch(ScheduledBatch((), evict=("a",))).result().tokens == []
    assert "ValueError at test_bad_input.py" in caplog.text
