"""Speculative decoding in the engine: whom a draft costs what (nobody anything), where it ends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mm_engine.engine.engine import Engine
from mm_engine.errors import PluginError
from mm_engine.sequence import ScheduledBatch, StepResult

A, B = 65, 66


@pytest.fixture
def drafting(new_engine) -> Callable[..., tuple[Engine, Any]]:
    """`drafting(...)`: an engine with drafts of 4; the model says A for ever, so all are right."""

    def make(**options: Any) -> tuple[Engine, Any]:
        given = {"num_speculative_tokens": 4, "prompt_lookup_min": 1, **options}
        engine, runner = new_engine(**given)
        runner.says = lambda rows: A
        return engine, runner

    return make


def counts(engine: Engine) -> tuple[int, int, int]:
    stats = engine.stats()
    return stats.num_drafts, stats.num_draft_tokens, stats.num_accepted_tokens


def test_right_drafts_bring_many_tokens_in_one_step(drafting, new_request, run_all) -> None:
    engine, runner = drafting()
    engine.add(new_request("A", [3], max_tokens=12, ignore_eos=True))
    output = run_all(engine)["A"].outputs[0]
    assert output.token_ids == [A] * 12
    # The first A was never seen before; the second has followed one.
    assert runner.order == [[("A", 3)], [("A", 1)], [("A", 5)], [("A", 5)]]
    assert counts(engine) == (2, 8, 8)
    assert engine.stats().num_generation_tokens == 12


def test_without_the_option_nothing_is_drafted(new_engine, new_request, run_all) -> None:
    engine, runner = new_engine()
    runner.says = lambda rows: A
    engine.add(new_request("A", [3], max_tokens=6, ignore_eos=True))
    run_all(engine)
    assert [share for step in runner.order for share in step] == [("A", 3)] + [("A", 1)] * 5
    assert counts(engine) == (0, 0, 0)


def test_an_answer_that_quotes_its_prompt_takes_fewer_steps(
    new_engine, new_request, run_all
) -> None:
    steps = {}
    for num in (0, 4):
        engine, runner = new_engine(
            max_num_batched_tokens=64, num_speculative_tokens=num, prompt_lookup_min=2
        )
        # Position 40 + i says what position i does, as an answer that repeats a text does.
        runner.says = lambda rows: rows[len(rows) - 40] if len(rows) > 40 else 1
        engine.add(new_request("A", [40], max_tokens=31, ignore_eos=True))
        assert run_all(engine)["A"].outputs[0].token_ids == list(range(1, 32))
        steps[num] = engine.stats().num_steps
    # 31 tokens: one with the prompt, the next to be known again, then five a step.
    assert steps == {0: 31, 4: 2 + 6}


def test_wrong_drafts_change_nothing_but_the_count(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine(vocab=3, num_speculative_tokens=4, prompt_lookup_min=1)
    request = new_request("A", [3], max_tokens=40, ignore_eos=True)
    engine.add(request)
    assert run_all(engine)["A"].outputs[0].token_ids == expected(request, 0, runner.vocab)
    _, drafted, accepted = counts(engine)
    assert 0 < accepted < drafted
    assert engine.stats().num_steps == 40 - accepted


def test_a_draft_is_no_longer_than_max_tokens_leaves_room(drafting, new_request, run_all) -> None:
    engine, runner = drafting()
    engine.add(new_request("A", [3], max_tokens=4, ignore_eos=True))
    assert run_all(engine)["A"].outputs[0].finish_reason == "length"
    assert runner.order == [[("A", 3)], [("A", 1)], [("A", 2)]]


def test_a_draft_takes_what_the_budget_leaves_and_no_token_of_a_prompt(
    drafting, new_request, run_all
) -> None:
    engine, runner = drafting(max_num_batched_tokens=6)
    engine.add(new_request("A", [3], max_tokens=30, ignore_eos=True))
    for _ in range(2):
        engine.step()
    engine.add(new_request("B", [8], max_tokens=1))
    engine.add(new_request("C", [1], max_tokens=20, ignore_eos=True))
    run_all(engine)
    assert runner.order[2:7] == [
        [("A", 1), ("B", 5)],
        [("A", 2), ("B", 3), ("C", 1)],  # one token was left
        [("A", 5), ("C", 1)],
        [("A", 5), ("C", 1)],
        [("A", 5), ("C", 1)],  # the older go first
    ]


@pytest.mark.parametrize(
    ("num_blocks", "order"),
    [
        (10, [[("A", 2), ("B", 2)]]),
        (9, [[("A", 2), ("B", 1)], [("B", 1)]]),  # the older takes the last free one
        (8, [[("A", 1), ("B", 1)], [("A", 1), ("B", 1)]]),
    ],
)
def test_a_draft_takes_free_blocks_only_and_preempts_nobody(
    drafting, new_request, run_all, num_blocks: int, order
) -> None:
    engine, runner = drafting(num_blocks=num_blocks, block_size=1, enable_prefix_caching=False)
    for name in "AB":
        engine.add(new_request(name, [2], max_tokens=4, ignore_eos=True))
    sums = run_all(engine)
    # The third step plans 2 + 1 + 1 tokens of each: what is over goes to drafts.
    assert runner.order[:2] == [[("A", 2), ("B", 2)], [("A", 1), ("B", 1)]]
    assert runner.order[2] == order[0]
    assert all(output.outputs[0].token_ids == [A] * 4 for output in sums.values())
    assert engine.stats().num_preemptions == (num_blocks == 8)


def test_blocks_of_a_rejected_draft_are_free_again_after_the_step(drafting, new_request) -> None:
    engine, runner = drafting(block_size=1, enable_prefix_caching=False)
    engine.add(new_request("A", [3], max_tokens=20, ignore_eos=True))
    for _ in range(2):
        engine.step()
    runner.says = lambda rows: B  # and the draft says A
    engine.step()
    assert runner.order[-1] == [("A", 5)]
    (sequence,) = engine.scheduler.running
    assert sequence.output_token_ids == [A, A, B]
    assert sequence.num_uncomputed_tokens == 1
    assert engine.stats().num_used_blocks == len(sequence.block_table) == 5
    assert counts(engine) == (1, 4, 0)


def test_no_block_is_kept_for_what_was_rejected(drafting, new_request, run_all) -> None:
    engine, runner = drafting(block_size=2)
    engine.add(new_request("A", [2], max_tokens=20, ignore_eos=True))
    for _ in range(2):
        engine.step()
    runner.says = lambda rows: B
    engine.step()  # computes A A A A A behind the prompt and one A, and takes B
    (sequence,) = engine.scheduler.running
    assert sequence.num_computed_tokens == 4
    assert engine.stats().num_kept_blocks == 2


def test_accepted_tokens_fill_blocks_that_others_find(drafting, new_request, run_all) -> None:
    engine, _ = drafting(block_size=2)
    engine.add(new_request("A", [2], max_tokens=12, ignore_eos=True))
    engine.step()
    while engine.has_work:
        engine.step()
    assert counts(engine)[2] == 8
    request = new_request("B", [2], max_tokens=1)
    again = replace(request, prompt_token_ids=request.prompt_token_ids + (A,) * 11)
    engine.add(again)
    assert run_all(engine)["B"].num_cached_tokens == 12


@pytest.mark.parametrize(
    ("params", "num_tokens", "text", "reason"),
    [
        ({"stop_token_ids": [A], "min_tokens": 4}, 5, "A" * 4, A),
        ({"stop": ["AAAA"], "ignore_eos": True}, 4, "", "AAAA"),
        ({"stop": ["AAAA"], "include_stop_str_in_output": True}, 4, "AAAA", "AAAA"),
        ({"stop": ["A"], "min_tokens": 3}, 4, "AAA", "A"),
    ],
    ids=["stop-token", "stop-string", "stop-string-included", "stop-string-later"],
)
def test_an_answer_that_ends_inside_a_draft_ends_there(
    drafting, new_request, run_all, tokenizer, params, num_tokens: int, text: str, reason
) -> None:
    letter = tokenizer.encode("A", add_special_tokens=False)[0]
    if "stop_token_ids" in params:
        params = {**params, "stop_token_ids": [letter]}
        reason = letter
    engine, runner = drafting()
    runner.says = lambda rows: letter
    engine.add(new_request("A", [3], max_tokens=30, logprobs=1, **params))
    (output,) = run_all(engine)["A"].outputs
    assert output.token_ids == [letter] * num_tokens
    assert (output.text, output.finish_reason, output.stop_reason) == (text, "stop", reason)
    assert len(output.logprobs) == num_tokens
    num_drafts, drafted, accepted = counts(engine)
    assert (num_drafts, drafted) == (1, 4)
    assert accepted == num_tokens - 2  # those that are in the answer
    assert engine.stats().num_used_blocks == 0 or not engine.step()
    assert engine.stats().num_used_blocks == 0


def test_eos_inside_a_draft_ends_the_answer(new_engine, new_request, run_all) -> None:
    eos = new_request("A", [1]).eos_token_ids[0]
    engine, runner = new_engine(num_speculative_tokens=4, prompt_lookup_min=1)
    runner.says = lambda rows: [A, B, eos][len(rows) % 3]
    request = new_request("A", [2], max_tokens=30)
    prompt = (A, B, eos, A, B, eos)
    engine.add(replace(request, prompt_token_ids=prompt))
    (output,) = run_all(engine)["A"].outputs
    assert output.token_ids == [A, B, eos]
    assert output.finish_reason == "stop"
    assert runner.order == [[("A", 6)], [("A", 5)]]
    assert counts(engine) == (1, 4, 2)


def test_a_steps_tokens_come_in_one_output(drafting, new_request) -> None:
    engine, _ = drafting()
    engine.add(new_request("A", [3], max_tokens=12, n=2, logprobs=2, ignore_eos=True))
    news = [engine.step() for _ in range(3)][-1]
    (output,) = news
    assert [completion.index for completion in output.outputs] == [0, 1]
    for completion in output.outputs:
        assert completion.token_ids == [A] * 5
        assert [list(entries) for entries in completion.logprobs] == [[A, 64]] * 5
        assert completion.finish_reason is None


def test_an_abort_while_a_draft_is_computed_leaves_nothing(drafting, new_request) -> None:
    engine, runner = drafting(block_size=1)
    engine.add(new_request("A", [3], max_tokens=20, ignore_eos=True))
    for _ in range(2):
        engine.step()
    runner.after_run = lambda: engine.abort("A")
    (output,) = engine.step()
    assert runner.order[-1] == [("A", 5)]
    assert output.outputs[0].token_ids == [] and output.outputs[0].finish_reason == "abort"
    engine.step()
    assert not engine.has_work and engine.stats().num_used_blocks == 0


@pytest.mark.parametrize("names", ["A", "AB"], ids=["alone", "beside-another"])
def test_what_a_draft_alone_makes_fail_does_not_fail(
    drafting, new_request, run_all, names: str
) -> None:
    """As if the model raised for an id that only a draft has."""
    engine, runner = drafting()
    run_step, num_raised = runner.run, 0

    def run(batch: ScheduledBatch) -> StepResult:
        nonlocal num_raised
        if any(share.draft_token_ids for share in batch.sequences):
            num_raised += 1
            runner.failed = True
            raise PluginError("mm-x 1.0: what a token")
        result: StepResult = run_step(batch)
        return result

    engine.runner._runner.run = run
    for name in names:
        engine.add(new_request(name, [3], max_tokens=8, ignore_eos=True))
    sums = run_all(engine)
    for name in names:
        assert sums[name].error is None
        assert sums[name].outputs[0].token_ids == [A] * 8
    assert num_raised == 5  # each step from the third on; the last needs no draft
    assert engine.stats().num_accepted_tokens == 0
