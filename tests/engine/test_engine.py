"""What ends a sequence, what comes back, and what one request may do to another: nothing."""

from __future__ import annotations

import logging

import pytest
import torch

from mm_engine.errors import EngineDead, PluginError, RequestError
from mm_engine.outputs import CompletionOutput, ErrorInfo, RequestOutput
from mm_engine.sequence import SampledToken, ScheduledBatch, StepResult
from sequences import AtOnce

EOS_ID = 298


class Scripted(AtOnce):
    """A runner that says given tokens; sampling is not what is tested here."""

    def __init__(self, token_ids: list[int]) -> None:
        self.token_ids = token_ids

    def run(self, batch: ScheduledBatch) -> StepResult:
        return StepResult(
            [
                SampledToken(
                    self.token_ids[share.sequence.num_output_tokens] if share.samples else None
                )
                for share in batch.sequences
            ]
        )


@pytest.fixture
def answer(new_engine, new_request, run_all, tokenizer):
    """`answer("text" or ids, ...)`: what becomes of a model that says this; params as keywords."""

    def run(says: str | list[int], **params: object) -> CompletionOutput:
        ids = says if isinstance(says, list) else tokenizer.encode(says, add_special_tokens=False)
        engine, _ = new_engine()
        engine.runner = Scripted([*ids, EOS_ID])
        engine.add(new_request("A", [3], **{"max_tokens": 50, **params}))
        (output,) = run_all(engine)["A"].outputs
        return output

    return run


def test_eos_ends_the_text_and_stands_among_the_ids(answer, tokenizer) -> None:
    output = answer("a red circle", skip_special_tokens=False)
    assert output.text == "a red circle"
    assert output.token_ids == [*tokenizer.encode("a red circle"), EOS_ID]
    assert (output.finish_reason, output.stop_reason) == ("stop", None)


def test_eos_is_a_token_like_any_other_if_asked(answer) -> None:
    output = answer([65, EOS_ID, 65, 65], ignore_eos=True, max_tokens=4, skip_special_tokens=False)
    assert output.token_ids == [65, EOS_ID, 65, 65]
    assert "</s>" in output.text
    assert output.finish_reason == "length"


def test_a_stop_token_ends_the_text_and_is_the_reason(answer, tokenizer) -> None:
    ids = tokenizer.encode("a red")
    output = answer([*ids, 66, 67], stop_token_ids=(66,))
    assert (output.text, output.token_ids) == ("a red", [*ids, 66])
    assert (output.finish_reason, output.stop_reason) == ("stop", 66)


def test_a_stop_tokens_text_can_be_kept(answer, tokenizer) -> None:
    ids = tokenizer.encode("a red")
    output = answer([*ids, 66], stop_token_ids=(66,), include_stop_str_in_output=True)
    assert output.text == tokenizer.decode([*ids, 66])


def test_max_tokens_ends_it_with_what_was_held_back(answer) -> None:
    num_tokens = 3
    whole = answer("a red circle", max_tokens=num_tokens)
    held = answer("a red circle", max_tokens=num_tokens, stop=(whole.text[-1] + "#",))
    assert whole.finish_reason == held.finish_reason == "length"
    assert whole.text == held.text != ""
    assert len(held.token_ids) == num_tokens


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_ends_it(answer, include: bool) -> None:
    output = answer("a red circle", stop=("cir", "#"), include_stop_str_in_output=include)
    assert output.text == ("a red cir" if include else "a red ")
    assert (output.finish_reason, output.stop_reason) == ("stop", "cir")


def test_a_stop_string_in_the_last_allowed_token_is_the_reason(answer, tokenizer) -> None:
    num_tokens = len(tokenizer.encode("a red"))
    output = answer("a red circle", stop=("red",), max_tokens=num_tokens)
    assert (output.text, output.finish_reason, output.stop_reason) == ("a ", "stop", "red")


def test_nothing_stops_it_before_min_tokens(answer) -> None:
    says = [66, EOS_ID, 67, 66, EOS_ID, 67]
    output = answer(says, min_tokens=4, stop_token_ids=(66,))
    assert output.token_ids == says[:5]
    output = answer("aaaa red a", min_tokens=4, stop=("a",))
    assert output.text.startswith("aaaa") and output.stop_reason == "a"


def test_text_is_the_same_streamed_and_whole(new_engine, new_request, tokenizer) -> None:
    engine, _ = new_engine()
    engine.runner = Scripted([*tokenizer.encode("🙂 你好 red circ"), EOS_ID])
    engine.add(new_request("A", [3], max_tokens=50, stop=("circle",)))
    text = ""
    while engine.has_work:
        for output in engine.step():
            assert not output.outputs[0].text or "\ufffd" not in output.outputs[0].text
            text += output.outputs[0].text
    assert text == "🙂 你好 red circ"


def test_logprobs_hold_the_chosen_token_first_and_its_text(
    new_engine, new_request, run_all
) -> None:
    engine, _ = new_engine()
    engine.add(new_request("A", [3], max_tokens=3, ignore_eos=True, logprobs=2))
    (output,) = run_all(engine)["A"].outputs
    assert len(output.logprobs) == 3
    for token_id, entries in zip(output.token_ids, output.logprobs, strict=True):
        assert list(entries) == [token_id, 64]
        assert (entries[token_id].logprob, entries[token_id].rank) == (-1.5, 1)
        assert entries[64].rank == 2
        assert isinstance(entries[64].decoded_token, str)


def test_no_logprobs_unless_asked(new_engine, new_request, run_all) -> None:
    engine, _ = new_engine()
    engine.add(new_request("A", [3]))
    assert run_all(engine)["A"].outputs[0].logprobs is None


@pytest.mark.parametrize(
    ("parts", "params", "param"),
    [
        ([], {}, "prompt"),
        ([3], {"max_tokens": None}, "max_tokens"),
        ([100], {"max_tokens": 29}, "max_tokens"),
    ],
)
def test_what_cannot_be_answered_is_refused(new_engine, new_request, parts, params, param) -> None:
    engine, _ = new_engine(max_model_len=128)
    with pytest.raises(RequestError) as error:
        engine.add(new_request("A", parts, **params))
    assert error.value.param == param
    assert not engine.has_work


def test_an_id_in_use_is_refused_and_free_again_afterwards(
    new_engine, new_request, run_all
) -> None:
    engine, _ = new_engine()
    engine.add(new_request("A", [3]))
    with pytest.raises(RequestError, match="in use: A"):
        engine.add(new_request("A", [3]))
    run_all(engine)
    engine.add(new_request("A", [3]))
    assert run_all(engine)["A"].finished


@pytest.mark.parametrize("when", ["waiting", "prefilling", "decoding", "running"])
@pytest.mark.parametrize("notify", [True, False])
def test_an_aborted_request_ends_at_once_and_leaves_nothing(
    new_engine, new_request, run_all, expected, when: str, notify: bool
) -> None:
    engine, runner = new_engine(max_num_batched_tokens=4, max_num_seqs=3)
    neighbour = new_request("N", [3], max_tokens=30, ignore_eos=True)
    sums = {"N": RequestOutput("N")}
    engine.add(neighbour)
    engine.add(new_request("A", [2, "a", 6], n=2, max_tokens=20, ignore_eos=True))
    num_steps = {"waiting": 0, "prefilling": 2, "decoding": 14, "running": 14}[when]
    outputs = [output for _ in range(num_steps) for output in engine.step()]
    if when == "running":
        runner.after_run = lambda: engine.abort("A", notify=notify)
    else:
        engine.abort("A", notify=notify)
    num_news = len(outputs)
    outputs += engine.step()
    runner.after_run = lambda: None
    last = [output for output in outputs[num_news:] if output.request_id == "A"]
    assert len(last) == notify
    if notify:
        assert last[0].finished
        assert [output.finish_reason for output in last[0].outputs] == ["abort", "abort"]
    num_preempted = engine.stats().num_preemptions
    outputs += engine.step()
    assert engine.stats().num_running == 1
    assert engine.stats().num_used_blocks == len(engine.scheduler.running[0].block_table)
    while engine.has_work:
        outputs += engine.step()
    for output in outputs:
        if output.request_id == "N":
            sums["N"].extend(output)
    assert sums["N"].outputs[0].token_ids == expected(neighbour, 0, runner.vocab)
    assert engine.stats().num_used_blocks == num_preempted == 0


def test_aborting_what_is_unknown_or_finished_does_nothing(
    new_engine, new_request, run_all
) -> None:
    engine, _ = new_engine()
    engine.abort("nobody")
    engine.add(new_request("A", [3], max_tokens=1))
    engine.step()
    engine.abort("A")
    assert engine.step() == []


def test_a_caller_that_leaves_after_aborting_gets_nothing(new_engine, new_request) -> None:
    engine, _ = new_engine()
    engine.add(new_request("A", [3]))
    engine.abort("A")
    engine.abort("A", notify=False)
    assert engine.step() == []
    assert not engine.has_work


def test_a_step_that_raises_fails_only_the_request_to_blame(
    new_engine, new_request, run_all, expected, caplog: pytest.LogCaptureFixture
) -> None:
    engine, runner = new_engine()
    good = [new_request(name, [2, "shared", 1], max_tokens=6) for name in ("A", "C")]
    runner.raises["B"] = ZeroDivisionError("/secret/path")
    engine.add(good[0])
    engine.add(new_request("B", ["shared", 3], n=2))
    engine.add(good[1])
    with caplog.at_level(logging.WARNING):
        sums = run_all(engine)
    assert sums["B"].finished
    assert sums["B"].outputs == []
    assert sums["B"].error.name == "MMEngineError"
    assert "ZeroDivisionError" in sums["B"].error.message
    assert "secret" not in sums["B"].error.message
    assert "ZeroDivisionError at checking_runner.py:" in caplog.text
    assert "Traceback" not in caplog.text and "secret" not in caplog.text
    for request in good:
        assert sums[request.request_id].outputs[0].token_ids == expected(request, 0, runner.vocab)
    assert engine.stats().num_used_blocks == 0


def test_a_completion_that_fails_ends_its_siblings_and_no_neighbour(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine()
    neighbour = new_request("B", [3], max_tokens=9)
    engine.add(new_request("A", [3], n=3, max_tokens=9, ignore_eos=True))
    engine.add(neighbour)
    run_step = runner.run

    def run(batch: ScheduledBatch) -> StepResult:
        result: StepResult = run_step(batch)
        for share, token in zip(batch.sequences, result.tokens, strict=True):
            if share.sequence.index == 1 and share.sequence.num_output_tokens == 2:
                token.error = ErrorInfo("PluginError", "NaN")
        return result

    runner.run = run
    news = [output for _ in range(2) for output in engine.step()]
    assert all(len(output.outputs) == 3 for output in news if output.request_id == "A")
    sums = run_all(engine)
    assert sums["A"].finished and sums["A"].outputs == []
    assert sums["A"].error == ErrorInfo("PluginError", "NaN")
    tokens = [t for o in news if o.request_id == "B" for t in o.outputs[0].token_ids]
    assert tokens + sums["B"].outputs[0].token_ids == expected(neighbour, 0, runner.vocab)


def test_text_that_cannot_be_made_fails_only_its_request(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine()
    neighbour = new_request("B", [4], max_tokens=6)
    engine.add(new_request("A", [3], max_tokens=6, ignore_eos=True))
    engine.add(neighbour)
    run_step = runner.run

    def run(batch: ScheduledBatch) -> StepResult:
        result: StepResult = run_step(batch)
        for share, token in zip(batch.sequences, result.tokens, strict=True):
            if share.sequence.request.request_id == "A":
                token.token_id = -1  # no tokenizer knows it
        return result

    runner.run = run
    sums = run_all(engine)
    assert "internal error" in sums["A"].error.message
    assert sums["B"].outputs[0].token_ids == expected(neighbour, 0, runner.vocab)


@pytest.mark.parametrize(
    ("raised", "name", "message"),
    [
        (PluginError("mm-x 1.0: broken"), "PluginError", "mm-x 1.0: broken"),
        (SystemExit(3), "MMEngineError", "internal error: SystemExit"),
    ],
)
def test_a_request_alone_that_raises_gets_the_error(
    new_engine, new_request, run_all, raised, name, message
) -> None:
    engine, runner = new_engine()
    runner.raises["A"] = raised
    engine.add(new_request("A", [3]))
    error = run_all(engine)["A"].error
    assert error.name == name
    assert message in error.message


def test_interrupting_the_program_is_nobodys_fault(new_engine, new_request) -> None:
    engine, runner = new_engine()
    runner.raises["A"] = KeyboardInterrupt()
    engine.add(new_request("A", [3]))
    with pytest.raises(KeyboardInterrupt):
        engine.step()


def test_an_image_that_fails_is_not_taken_for_encoded(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine()
    runner.bad_items["bad"] = ErrorInfo("PluginError", "wrong shape")
    neighbour = new_request("B", ["good", 2])
    engine.add(new_request("A", [1, "bad"]))
    engine.add(neighbour)
    sums = run_all(engine)
    assert sums["A"].error == ErrorInfo("PluginError", "wrong shape")
    assert sums["B"].outputs[0].token_ids == expected(neighbour, 0, runner.vocab)
    runner.bad_items.clear()
    again = new_request("A", [1, "bad"])
    engine.add(again)
    assert run_all(engine)["A"].outputs[0].token_ids == expected(again, 0, runner.vocab)


def test_features_evicted_by_a_step_that_failed_are_still_evicted(
    new_engine, new_request, run_all
) -> None:
    engine, runner = new_engine(max_rows=4)
    engine.add(new_request("A", ["a"]))
    run_all(engine)
    broken = runner.run
    runner.run = lambda batch: 1 / 0
    engine.add(new_request("B", ["b"]))
    assert run_all(engine)["B"].error is not None
    runner.run = broken
    engine.add(new_request("C", ["c"]))
    assert run_all(engine)["C"].error is None
    assert list(runner.features) == ["c"]


def test_stats_count_what_happened(new_engine, new_request, run_all) -> None:
    engine, _ = new_engine(block_size=4, num_blocks=10)
    engine.add(new_request("A", [3, "a"], max_tokens=5, ignore_eos=True))
    engine.step()
    stats = engine.stats()
    assert (stats.num_running, stats.num_waiting) == (1, 0)
    assert (stats.num_used_blocks, stats.num_blocks) == (2, 10)
    engine.add(new_request("B", [2, "a"], max_tokens=5, ignore_eos=True))
    assert engine.stats().num_waiting == 1
    run_all(engine)
    stats = engine.stats()
    assert (stats.num_prompt_tokens, stats.num_generation_tokens) == (13, 10)
    assert (stats.num_encodes, stats.num_encoder_hits, stats.encoder_rows) == (1, 1, 4)
    assert (stats.num_steps, stats.num_used_blocks) == (6, 0)


def test_recomputed_prompts_are_counted_once(new_engine, new_request, run_all) -> None:
    engine, _ = new_engine(num_blocks=14, block_size=1)
    for name in ("A", "B"):
        engine.add(new_request(name, [6], max_tokens=8, ignore_eos=True))
    run_all(engine)
    assert engine.stats().num_preemptions > 0
    assert engine.stats().num_prompt_tokens == 12


@pytest.mark.parametrize("num", [1, 3])
def test_a_device_that_is_lost_ends_the_engine_and_blames_nobody(
    new_engine, new_request, num: int, caplog: pytest.LogCaptureFixture
) -> None:
    """After such an error every call raises: requests would fail one by one, for ever."""
    engine, runner = new_engine()
    for i in range(num):
        engine.add(new_request(f"{i}", [3 + i]))
    runner.raises["0"] = torch.AcceleratorError("CUDA error: an illegal memory access")
    with pytest.raises(EngineDead, match=r"its device has failed \(AcceleratorError\)"):
        engine.step()
    assert "illegal memory access" in caplog.text
