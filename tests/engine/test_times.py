"""How long a request waited for its first step, and for its first token: told once, with that."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mm_engine.engine import engine as engine_module
from mm_engine.engine import scheduler as scheduler_module
from mm_engine.engine.engine import Engine
from mm_engine.outputs import ErrorInfo, RequestTimes


class Clock:
    """A second for each step."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def tick(self) -> None:
        self.now += 1


@pytest.fixture
def times_of(new_engine, monkeypatch) -> Callable[..., tuple[Engine, dict[str, RequestTimes]]]:
    """`times_of(*requests, **options)`: the engine, and the times that it tells of each request."""

    def run(*requests: object, **options: object) -> tuple[Engine, dict[str, RequestTimes]]:
        clock = Clock()
        monkeypatch.setattr(engine_module, "time", clock)
        monkeypatch.setattr(scheduler_module, "time", clock)
        engine, runner = new_engine(enable_prefix_caching=False, **options)
        runner.after_run = clock.tick
        for request in requests:
            engine.add(request)
        told: dict[str, RequestTimes] = {}
        while engine.has_work:
            for output in engine.step():
                if output.times is not None:
                    assert output.request_id not in told, "told twice"
                    assert output.outputs[0].token_ids, "comes with the first token"
                    told[output.request_id] = output.times
        return engine, told

    return run


def test_one_that_waits_for_another_tells_how_long(times_of, new_request) -> None:
    requests = [new_request(name, [3], max_tokens=5, ignore_eos=True) for name in "AB"]
    _, told = times_of(*requests, max_num_seqs=1)
    assert told == {"A": RequestTimes(0, 1), "B": RequestTimes(5, 1)}


def test_a_prompt_in_chunks_is_started_with_the_first(times_of, new_request) -> None:
    _, told = times_of(new_request("A", [12], max_tokens=3), max_num_batched_tokens=4)
    assert told == {"A": RequestTimes(0, 3)}


def test_completions_of_a_request_tell_its_times_once(times_of, new_request) -> None:
    request = new_request("A", [5], n=3, max_tokens=4, ignore_eos=True)
    _, told = times_of(request, max_num_seqs=2)
    assert told == {"A": RequestTimes(0, 1)}


def test_one_that_is_recomputed_was_started_once(times_of, new_request) -> None:
    requests = [new_request(name, [6], max_tokens=8, ignore_eos=True) for name in "AB"]
    engine, told = times_of(*requests, num_blocks=14, block_size=1)
    assert engine.stats().num_preemptions > 0
    assert told == {"A": RequestTimes(0, 1), "B": RequestTimes(0, 1)}


def test_one_preempted_in_its_prompt_counts_from_its_first_start(times_of, new_request) -> None:
    """B has six of its eight tokens computed when A, which decodes, takes its blocks."""
    requests = [
        new_request("A", [4], max_tokens=8, ignore_eos=True),
        new_request("B", [8], max_tokens=2, ignore_eos=True),
    ]
    engine, told = times_of(*requests, num_blocks=13, block_size=1, max_num_batched_tokens=4)
    assert engine.stats().num_preemptions == 1
    assert told["A"] == RequestTimes(0, 1)
    assert told["B"] == RequestTimes(1, 9)  # A ends with step 8, B's prompt takes two


def test_what_ends_before_its_first_token_tells_none(new_engine, new_request) -> None:
    engine, _ = new_engine(max_num_batched_tokens=4)
    engine.add(new_request("A", [12]))
    engine.step()
    engine.abort("A")
    assert [output.times for output in engine.step()] == [None]


@pytest.mark.parametrize(
    ("interval", "told"), [(0.0, [1] * 6), (0.5, [1] * 6), (1.0, [1, 2, 2, 1])]
)
def test_tokens_that_come_sooner_than_the_interval_are_told_together(
    new_engine, new_request, monkeypatch, interval: float, told: list[int]
) -> None:
    """Half a second for each step; the first token and the end are told at once."""
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    engine, runner = new_engine(output_interval=interval)

    def tick() -> None:
        clock.now += 0.5

    runner.after_run = tick
    engine.add(new_request("A", [3], max_tokens=6, ignore_eos=True))
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    assert [len(output.outputs[0].token_ids) for output in outputs] == told


@pytest.mark.parametrize("notify", [True, False])
def test_what_is_held_back_goes_with_its_request(
    new_engine, new_request, monkeypatch, notify: bool
) -> None:
    """Aborted, it is told with the end or not at all; the other's is told as ever."""
    clock = Clock()
    monkeypatch.setattr(engine_module, "time", clock)
    engine, _ = new_engine(output_interval=1.0)
    for name in "AB":
        engine.add(new_request(name, [3], max_tokens=6, ignore_eos=True))
    assert [len(o.outputs[0].token_ids) for o in engine.step()] == [1, 1]
    assert engine.step() == []
    engine.abort("A", notify=notify)
    outputs = []
    while engine.has_work:
        outputs += engine.step()
    told = {
        o.request_id: (len(o.outputs[0].token_ids), o.outputs[0].finish_reason) for o in outputs
    }
    assert told == {"B": (5, "length")} | ({"A": (1, "abort")} if notify else {})
    assert not engine._changed and len(outputs) == len(told)


def test_a_failure_is_told_at_once_in_place_of_what_is_held_back(
    new_engine, new_request, monkeypatch
) -> None:
    monkeypatch.setattr(engine_module, "time", Clock())
    engine, _ = new_engine(output_interval=1.0)
    asked = new_request("A", [3], max_tokens=6, ignore_eos=True, n=2)
    engine.add(asked)
    engine.step()
    assert engine.step() == []
    engine._fail(asked, ErrorInfo("RequestError", "It is at fault. Send another."))
    (output,) = engine.step()
    assert output.finished and output.error is not None and output.outputs == []
    assert not engine.has_work or engine.step() == []
