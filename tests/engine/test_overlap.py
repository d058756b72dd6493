"""Steps that overlap: one is planned and launched before the result of the one before is known.

That answers are the same is held by test_engine_properties.py, test_bad_input.py and, with a real
model, tests/test_parity_overlap.py; faults are in test_overlap_faults.py. Here: what overlaps, what
it costs, and what is waited for.
"""

from __future__ import annotations

from typing import Any

import pytest

from checking_runner import EOS_ID, CheckingRunner, assert_given_back
from mm_engine.engine.fault_barrier import Computed
from mm_engine.engine.pace import Pace
from mm_engine.outputs import RequestOutput
from mm_engine.sequence import (
    UNKNOWN_TOKEN,
    SampledToken,
    ScheduledBatch,
    StepResult,
)

LENGTHS = {"a": 6, "b": 4}


@pytest.fixture(scope="module")
def overlaps() -> bool:
    return True


def num_bubbles(runner: CheckingRunner) -> int:
    """Launches that found the device idle, the first aside; results come in order."""
    launched, told, bubbles = 0, 0, 0
    for event in runner.events:
        kind, number = event.split()
        if kind == "launch":
            launched += 1
            bubbles += launched > 1 and launched == told + 1
        else:
            told += 1
            assert int(number) == told
        assert launched - told <= 2
    assert launched == told
    return bubbles


@pytest.mark.parametrize("overlapping", [False, True])
def test_the_next_step_is_launched_before_a_result_is_taken(
    new_engine, new_request, run_all, overlapping: bool
) -> None:
    engine, runner = new_engine(async_scheduling=overlapping)
    engine.add(new_request("A", [3], max_tokens=3, ignore_eos=True))
    run_all(engine)
    order = {
        False: ["launch 1", "result 1", "launch 2", "result 2", "launch 3", "result 3"],
        True: ["launch 1", "launch 2", "result 1", "launch 3", "result 2", "result 3"],
    }
    assert runner.events == order[overlapping]


def test_what_comes_and_goes_every_day_is_no_reason_to_wait(
    new_engine, new_request, run_all, expected
) -> None:
    """Prompts in chunks, pictures, completions, ends by length and by a stop, an abort."""
    engine, runner = new_engine(num_blocks=80, max_num_batched_tokens=9, max_num_seqs=6, vocab=3)
    first = new_request("A", [3], max_tokens=40, ignore_eos=True)
    arriving = [
        new_request("B", [20, "a", 2], lengths=LENGTHS, max_tokens=5, ignore_eos=True),
        new_request("C", [2, "a", "b"], lengths=LENGTHS, max_tokens=20),
        new_request("D", [5], max_tokens=4, n=2),
        new_request("E", [1, "b"], lengths=LENGTHS, max_tokens=1),
        new_request("F", [4], max_tokens=30, ignore_eos=True),
        new_request("G", [2, "a", "b", 5], lengths=LENGTHS, max_tokens=20),
    ]
    engine.add(first)
    sums: dict[str, RequestOutput] = {}
    for request in arriving:
        run_all(engine, sums, num_steps=3)
        engine.add(request)
    run_all(engine, sums, num_steps=4)
    engine.abort("F")
    run_all(engine, sums)
    assert num_bubbles(runner) == 0
    assert runner.num_mixed_steps > 0 and runner.num_cut_items > 0
    assert {new.finish_reason for new in sums["C"].outputs + sums["D"].outputs} >= {"stop"}
    for request in (first, *arriving):
        for output in sums[request.request_id].outputs:
            wanted = expected(request, output.index, runner.vocab)
            num_told = len(output.token_ids) if request.request_id == "F" else len(wanted)
            assert output.token_ids == wanted[:num_told]
    assert_given_back(engine, runner)


def shares_of(runner: CheckingRunner, request_id: str) -> int:
    return sum(name == request_id for step in runner.order for name, _ in step)


ENDS: dict[str, tuple[dict[str, Any], int]] = {  # parameters, tokens of the answer
    "eos": ({"max_tokens": 9}, 4),
    "stop token": ({"max_tokens": 9, "stop_token_ids": (EOS_ID,)}, 4),
    "stop string": ({"max_tokens": 9, "stop": ("bc",)}, 3),
    "stop, its last token": ({"max_tokens": 3, "stop": ("c",)}, 3),
    "min_tokens": ({"max_tokens": 9, "min_tokens": 3, "stop": ("a", "b", "c")}, 4),
    "max_tokens": ({"max_tokens": 2}, 2),
    "one token": ({"max_tokens": 1}, 1),
}


@pytest.mark.parametrize(("params", "num_tokens"), ENDS.values(), ids=ENDS)
def test_a_stop_wastes_one_token_and_a_length_none(
    new_engine, new_request, run_all, tokenizer, params: dict[str, Any], num_tokens: int
) -> None:
    engine, runner = new_engine()
    letters = tokenizer.encode("abc", add_special_tokens=False)
    assert len(letters) == 3
    says = [*letters, EOS_ID, 68, 69, 70, 71, 72]
    runner.says = lambda rows: says[len(rows) - 3]
    engine.add(new_request("A", [3], logprobs=1, **params))
    told = run_all(engine)["A"].outputs[0]
    assert told.token_ids == says[:num_tokens]
    assert len(told.logprobs) == num_tokens
    assert engine.stats().num_generation_tokens == num_tokens
    wasted = 0 if num_tokens == params["max_tokens"] else 1
    assert told.finish_reason == ("length" if num_tokens < 3 else "stop")
    assert runner.num_wasted == shares_of(runner, "A") - num_tokens == wasted
    assert_given_back(engine, runner)


def test_ids_that_are_not_known_reach_no_text_and_no_output(
    new_engine, new_request, run_all, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, _ = new_engine(vocab=20, block_size=2)
    pushed: list[int | None] = []
    seen_unknown = 0
    engine.add(new_request("A", [3], max_tokens=20, n=3))
    for sequence in engine.scheduler.waiting:
        push = sequence.detokenizer.push
        monkeypatch.setattr(
            sequence.detokenizer,
            "push",
            lambda token, push=push, **how: pushed.append(token) or push(token, **how),
        )
    while engine.has_work:
        for output in engine.step():
            assert all(UNKNOWN_TOKEN not in new.token_ids for new in output.outputs)
        for sequence in engine.scheduler.running:
            unknown = [token == UNKNOWN_TOKEN for token in sequence.token_ids]
            assert sum(unknown) == unknown[-1] <= (not sequence.finished), "the newest"
            seen_unknown += sum(unknown)
    assert UNKNOWN_TOKEN not in pushed and len(pushed) > 5 and seen_unknown > 5
    assert engine.stats().num_kept_blocks > 3, "blocks of answers are kept, and have keys"


def test_who_has_ended_keeps_its_blocks_until_nothing_writes_to_them(
    new_engine, new_request, run_all
) -> None:
    """A ends by a stop, while a step that goes on with it is in flight. B wants all blocks."""
    engine, runner = new_engine(num_blocks=4, block_size=2, enable_prefix_caching=False)
    runner.says = lambda rows: EOS_ID if len(rows) == 4 else 65
    engine.add(new_request("A", [3], max_tokens=5))
    sums = run_all(engine, num_steps=3)
    assert sums["A"].outputs[0].token_ids == [65, EOS_ID] and sums["A"].finished
    assert runner.order == [[("A", 3)], [("A", 1)], [("A", 1)]] and runner.writes.keys() == {3}
    engine.add(new_request("B", [7], max_tokens=1))
    run_all(engine, sums, num_steps=1)
    assert len(runner.order) == 3 and runner.num_wasted == 1, "B had to wait"
    assert engine.stats().num_used_blocks == 3
    run_all(engine, sums, num_steps=1)
    assert runner.order[-1] == [("B", 7)]
    run_all(engine, sums)
    assert_given_back(engine, runner)


def test_a_last_step_in_flight_holds_no_seat(new_engine, new_request, run_all) -> None:
    """Else short answers would leave every other step to nobody."""
    engine, runner = new_engine(max_num_seqs=2, enable_prefix_caching=False)
    for i in range(6):
        engine.add(new_request(f"{i}", [3 + i], max_tokens=1))
    run_all(engine)
    assert [len(step) for step in runner.order] == [2, 2, 2]
    assert num_bubbles(runner) == 0


def test_an_aborted_request_keeps_its_blocks_and_not_its_seat(
    new_engine, new_request, run_all
) -> None:
    engine, runner = new_engine(max_num_seqs=1)
    engine.add(new_request("A", [6], max_tokens=9, ignore_eos=True))
    sums = run_all(engine, num_steps=3)
    engine.add(new_request("B", [3], max_tokens=2, ignore_eos=True))
    engine.abort("A")
    run_all(engine, sums, num_steps=1)
    assert runner.order[-1] == [("B", 3)], "the seat"
    assert [seq.request.request_id for seq in engine.scheduler.departures._holding] == ["A"], (
        "the blocks"
    )
    assert engine.stats().num_used_blocks == 3
    run_all(engine, sums, num_steps=1)
    assert engine.stats().num_used_blocks == 1
    run_all(engine, sums)
    assert num_bubbles(runner) == 0
    assert_given_back(engine, runner)


def test_who_must_give_way_does_so_when_its_step_is_over(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine(
        num_blocks=8, block_size=1, max_num_seqs=2, enable_prefix_caching=False
    )
    requests = [new_request(name, [2], max_tokens=5, ignore_eos=True) for name in "AB"]
    for request in requests:
        engine.add(request)
    sums = run_all(engine)
    assert engine.stats().num_preemptions == 1
    assert num_bubbles(runner) == 2, "for the preemption, and for the blocks that come back"
    for request in requests:
        assert sums[request.request_id].outputs[0].token_ids == expected(request, 0, runner.vocab)
    assert_given_back(engine, runner)


def test_a_better_priority_takes_a_seat_when_its_step_is_over(
    new_engine, new_request, run_all
) -> None:
    engine, runner = new_engine(max_num_seqs=1)
    engine.add(new_request("A", [2], max_tokens=6, ignore_eos=True, priority=1))
    run_all(engine, num_steps=2)
    engine.add(new_request("B", [2], max_tokens=3, ignore_eos=True))
    run_all(engine)
    names = [name for step in runner.order for name, _ in step]
    assert names == list("AAA" + "BBB" + "AAA"), "nothing is launched twice"
    assert num_bubbles(runner) == 1


def test_a_prompt_that_is_being_computed_is_not_computed_twice(
    new_engine, new_request, run_all
) -> None:
    """B comes while the step that computes its prompt's blocks for A is in flight."""
    engine, runner = new_engine()
    engine.add(new_request("A", [9], max_tokens=6, ignore_eos=True))
    sums = run_all(engine, num_steps=1)
    engine.add(new_request("B", [9, 3], max_tokens=2, ignore_eos=True))
    run_all(engine, sums)
    assert sums["B"].num_cached_tokens == 8
    assert runner.order[:3] == [[("A", 9)], [("A", 1)], [("A", 1), ("B", 4)]]
    assert num_bubbles(runner) == 0


@pytest.mark.parametrize("leaves", [False, True])
def test_a_slice_of_an_image_is_over_before_the_next_is_planned(
    new_engine, new_request, run_all, expected, leaves: bool
) -> None:
    """What B's image has come to decides about the next step; if B leaves, nothing of it stays."""
    engine, runner = new_engine(pace=Pace([(1, 1.0), (8, 4.0)], 2.0))
    requests = [
        new_request("A", [2], max_tokens=6 if leaves else 30, ignore_eos=True),
        new_request("B", [3, "a", 2], lengths=LENGTHS, max_tokens=3, ignore_eos=True),
    ]
    engine.add(requests[0])
    sums = run_all(engine, num_steps=2)
    engine.add(requests[1])
    run_all(engine, sums, num_steps=3)
    assert runner.num_slices > 1 and "a" in runner.begun
    if leaves:
        engine.abort("A", notify=False)
        engine.abort("B", notify=False)
    run_all(engine, sums)
    for request in [] if leaves else requests:
        tokens = sums[request.request_id].outputs[0].token_ids
        assert tokens == expected(request, 0, runner.vocab)
    assert runner.encoded == ([] if leaves else ["a"]) and not runner.begun
    assert_given_back(engine, runner)


class OnACPU:
    """A runner that computes where it launches; `now` is its clock."""

    def __init__(self) -> None:
        self.now = 0.0

    def launch(self, batch: ScheduledBatch) -> Computed:
        self.now += 1.0 + batch.num_tokens
        tokens = [SampledToken(65 if share.samples else None) for share in batch.sequences]
        return Computed(StepResult(tokens))


def test_a_pace_is_told_of_each_step_its_own_time(
    new_engine, new_request, run_all, tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between one result and the next lies what the step after computes."""
    runner, pace = OnACPU(), Pace([(1, 1.0), (100, 100.0)], 1000.0)
    engine = new_engine(pace=pace)[0]
    engine.runner._runner, engine._clock = runner, lambda: runner.now
    seen: list[tuple[int, float]] = []
    monkeypatch.setattr(pace, "observe", lambda size, seconds: seen.append((size, seconds)))
    engine.add(new_request("A", [5], max_tokens=6, ignore_eos=True))
    run_all(engine, num_steps=2)
    engine.add(new_request("B", [30], max_tokens=2, ignore_eos=True))
    run_all(engine)
    assert [size for size, _ in seen] == [5, 1, 27, 2, 1, 1], "4 of B's tokens were found"
    assert all(seconds == 1.0 + size for size, seconds in seen)
