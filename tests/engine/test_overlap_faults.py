"""Faults while steps overlap: in a launch, in a result, told with one; and interrupts."""

from __future__ import annotations

import random
from typing import Any

import pytest

from checking_runner import assert_given_back
from mm_engine.errors import PluginError
from mm_engine.outputs import ErrorInfo, RequestOutput
from mm_engine.sequence import ScheduledBatch, Sequence, StepResult

LENGTHS = {"a": 6, "b": 4}


@pytest.fixture(scope="module")
def overlaps() -> bool:
    return True


@pytest.mark.parametrize("error", [PluginError("mm-x 1.0: broken"), SystemExit(3)], ids=str)
def test_one_that_raises_fails_once_and_the_step_before_it_is_unharmed(
    new_engine, new_request, run_all, expected, caplog: pytest.LogCaptureFixture, error
) -> None:
    engine, runner = new_engine()
    neighbours = [
        new_request(name, [num, "a"], lengths=LENGTHS, max_tokens=8, ignore_eos=True)
        for name, num in (("A", 2), ("C", 3))
    ]
    for request in (neighbours[0], new_request("B", [3], max_tokens=8), neighbours[1]):
        engine.add(request)
    sums = run_all(engine, num_steps=3)
    assert len(sums["B"].outputs[0].token_ids) == 2
    runner.raises["B"] = error
    run_all(engine, sums)
    assert sums["B"].finished and sums["B"].error is not None
    for request in neighbours:
        assert sums[request.request_id].error is None
        assert sums[request.request_id].outputs[0].token_ids == expected(request, 0, runner.vocab)
    failures = [record for record in caplog.records if "failed" in record.message]
    assert len(failures) == 2, "one step, one sequence: it isn't launched once more"
    assert_given_back(engine, runner)


class Failing:
    """A step whose result the device never brings."""

    failed = False

    def __init__(self, launched: Any) -> None:
        self.launched = launched

    def result(self) -> StepResult:
        self.launched.result()
        raise RuntimeError("the device is lost")


@pytest.mark.parametrize("overlapping", [False, True])
def test_a_result_that_raises_fails_all_that_were_in_its_step(
    new_engine, new_request, run_all, expected, overlapping: bool
) -> None:
    engine, runner = new_engine(async_scheduling=overlapping, max_num_batched_tokens=6)
    launch = runner.launch

    def lost(batch: ScheduledBatch) -> Any:
        launched = launch(batch)
        return Failing(launched) if launched.number == 2 else launched

    runner.launch = lost
    for name in "AB":
        engine.add(new_request(name, [3], max_tokens=8, ignore_eos=True))
    late = new_request("C", [9], max_tokens=2, ignore_eos=True)
    sums = run_all(engine, num_steps=2)
    engine.add(late)
    run_all(engine, sums)
    for name in "AB":
        assert "internal error: RuntimeError" in sums[name].error.message
    assert sums["C"].outputs[0].token_ids == expected(late, 0, runner.vocab)
    assert_given_back(engine, runner)


@pytest.mark.parametrize("where", ["launch", "result", "process"])
def test_an_interrupt_anywhere_leaves_nothing_running(
    new_engine, new_request, run_all, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """As `LLM` does it: all are aborted, and what is in flight is waited for."""
    engine, runner = new_engine()
    for name in "AB":
        engine.add(new_request(name, [3, "a"], lengths=LENGTHS, max_tokens=8, ignore_eos=True))
    run_all(engine, num_steps=4)
    owner, method = {
        "launch": (runner, "run"),
        "result": (engine._in_flight[0].launched.launched, "result"),
        "process": (engine.scheduler.running[1].detokenizer, "push"),
    }[where]

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(owner, method, interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.step()
    for name in "AB":
        engine.abort(name, notify=False)
    assert run_all(engine, max_steps=5) == {}
    assert_given_back(engine, runner)


@pytest.mark.parametrize("seed", range(40))
def test_faults_of_every_kind_at_any_time_fail_those_at_fault_alone(
    new_engine, new_request, run_all, expected, check_blocks, seed: int
) -> None:
    """Launches that raise, NaN that is found with the result, images that can't be encoded."""
    rng = random.Random(seed)
    engine, runner = new_engine(
        num_blocks=rng.randint(12, 40), block_size=2, max_num_batched_tokens=8, max_rows=12, vocab=6
    )
    run, step, known = runner.run, 0, dict[bytes, list[bytes]]()
    at_fault: set[str] = set()
    nan = ErrorInfo("PluginError", "NaN")
    runner.late = rng.choice([nan, None])
    runner.bad_items["b"] = ErrorInfo("PluginError", "no.")

    def sick(batch: ScheduledBatch) -> StepResult:
        result: StepResult = run(batch)
        for share, token in zip(batch.sequences, result.tokens, strict=True):
            sick_now = share.sequence.request.request_id in at_fault and rng.random() < 0.7
            token.error = token.error or (nan if sick_now else None)
        return result

    runner.run = sick
    requests = [
        new_request(
            f"{i}",
            [rng.randint(1, 5), *rng.choice([[], ["a"], ["a", 2], ["b"]]), 1],
            lengths=LENGTHS,
            max_tokens=rng.randint(1, 8),
            n=rng.randint(1, 2),
            priority=rng.choice([0, 0, 1]),
        )
        for i in range(rng.randint(2, 9))
    ]
    sums: dict[str, RequestOutput] = {}
    sequences: list[Sequence] = []
    while engine.has_work or step < len(requests):
        if step < len(requests):
            engine.add(requests[step])
            sequences += engine._answers[f"{step}"].sequences
        if rng.random() < 0.2:
            bad = f"{rng.randrange(len(requests))}"
            at_fault.add(bad)
            if rng.random() < 0.5:
                runner.raises[bad] = PluginError("mm-x 1.0: broken")
        run_all(engine, sums, num_steps=1)
        check_blocks(engine, runner, known, sequences)
        step += 1
        assert step < 500, "no end in sight"
    for request in requests:
        answer, name = sums[request.request_id], request.request_id
        assert answer.finished
        has_bad_image = any(item.content_key == "b" for item in request.items)
        assert answer.error is not None or not has_bad_image
        if answer.error is not None:
            assert name in at_fault or has_bad_image
            continue
        for output in answer.outputs:
            assert output.token_ids == expected(request, output.index, runner.vocab)
    assert_given_back(engine, runner)
    owed = {*engine.encoder_cache._evict, *engine.runner._owed_evictions}
    assert engine.encoder_cache._rows.keys() == runner.features.keys() - owed
