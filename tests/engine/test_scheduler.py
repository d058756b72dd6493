"""The policy, rule by rule. Each runner's `order` lists per step: (request id, new tokens)."""

from __future__ import annotations

import pytest

from mm_engine.engine.encoder_cache import EncoderCache
from mm_engine.engine.kv_cache import KVCache
from mm_engine.engine.scheduler import Scheduler
from mm_engine.errors import RequestError
from mm_engine.sequence import Sequence, SequenceStatus


def ids(order: list[list[tuple[str, int]]]) -> list[str]:
    return ["".join(request_id for request_id, _ in step) for step in order]


def test_decodes_come_first_then_chunks_in_order_of_arrival(
    new_engine, new_request, run_all
) -> None:
    engine, runner = new_engine(max_num_batched_tokens=6)
    engine.add(new_request("A", [3], max_tokens=4, ignore_eos=True))
    engine.step()
    engine.add(new_request("B", [7], max_tokens=1))
    engine.add(new_request("C", [4], max_tokens=1))
    run_all(engine)
    assert runner.order == [
        [("A", 3)],
        [("A", 1), ("B", 5)],
        [("A", 1), ("B", 2), ("C", 3)],
        [("A", 1), ("C", 1)],
    ]


def test_decode_goes_on_while_a_long_prompt_is_read(new_engine, new_request, run_all) -> None:
    engine, runner = new_engine(max_num_batched_tokens=4)
    engine.add(new_request("A", [2], max_tokens=8, ignore_eos=True))
    engine.step()
    engine.add(new_request("B", [20], max_tokens=1))
    run_all(engine)
    assert [dict(step)["A"] for step in runner.order[:7]] == [2, 1, 1, 1, 1, 1, 1]
    assert dict(runner.order[1])["B"] == 3


def test_no_more_run_than_max_num_seqs(new_engine, new_request, run_all) -> None:
    engine, runner = new_engine(max_num_seqs=2)
    for name in "ABC":
        engine.add(new_request(name, [2], max_tokens=3, ignore_eos=True))
    run_all(engine)
    assert ids(runner.order) == ["AB", "AB", "AB", "C", "C", "C"]


def test_the_completions_of_a_request_are_sequences_of_their_own(
    new_engine, new_request, run_all
) -> None:
    engine, runner = new_engine(enable_prefix_caching=False)
    engine.add(new_request("A", [2, "a"], n=3, max_tokens=2, ignore_eos=True))
    output = run_all(engine)["A"].outputs
    assert len({tuple(completion.token_ids) for completion in output}) == 3
    assert runner.order == [[("A", 6)] * 3, [("A", 1)] * 3]
    assert runner.encoded == ["a"]


def test_the_youngest_is_preempted_and_resumes_before_later_arrivals(
    new_engine, new_request, run_all
) -> None:
    engine, runner = new_engine(
        num_blocks=8, block_size=1, max_num_seqs=2, enable_prefix_caching=False
    )
    for name, prompt in (("A", 2), ("B", 3), ("C", 1)):
        engine.add(new_request(name, [prompt], max_tokens=4, ignore_eos=True))
    run_all(engine)
    # Step 3 needs 4 + 5 blocks of 8: B gives way. It is back when A has left, before C, with
    # the 3 + 2 tokens that it had, to be computed again.
    assert runner.order[:5] == [
        [("A", 2), ("B", 3)],
        [("A", 1), ("B", 1)],
        [("A", 1)],
        [("A", 1)],
        [("B", 5), ("C", 1)],
    ]
    assert engine.stats().num_preemptions == 1


def test_preemption_does_not_change_the_tokens(new_engine, new_request, run_all, expected) -> None:
    engine, runner = new_engine(num_blocks=14, block_size=1)
    requests = [
        new_request(name, [1, name, 1], max_tokens=8, ignore_eos=True) for name in ("A", "B")
    ]
    for request in requests:
        engine.add(request)
    sums = run_all(engine)
    assert engine.stats().num_preemptions > 0
    for request in requests:
        assert sums[request.request_id].outputs[0].token_ids == expected(request, 0, runner.vocab)


def test_who_was_preempted_in_a_plan_and_is_admitted_again_in_it_has_one_chunk(
    new_engine, new_request, run_all, expected
) -> None:
    """Its turn comes after that of the one that preempted it, and then it runs already."""
    engine, runner = new_engine(
        num_blocks=12, vocab=1, max_rows=5, block_size=3, max_num_batched_tokens=4, max_num_seqs=3
    )
    lengths = {"a": 1, "b": 3, "c": 5}
    requests = [
        new_request("A", [1, "a", 1], lengths=lengths, max_tokens=1),
        new_request("B", [1, 1, "a", 1], lengths=lengths, max_tokens=1),
        new_request(
            "C", [1, 7, "b", "b", "c"], lengths=lengths, max_tokens=4, n=3, ignore_eos=True
        ),
    ]
    for request in requests:
        engine.add(request)
    sums = run_all(engine)
    for request in requests:
        for output in sums[request.request_id].outputs:
            assert output.token_ids == expected(request, output.index, runner.vocab)


def test_a_planned_decode_leaves_the_step_when_an_older_prompt_needs_its_blocks(
    new_engine, new_request, run_all
) -> None:
    engine, runner = new_engine(
        num_blocks=14, block_size=1, max_num_batched_tokens=6, enable_prefix_caching=False
    )
    # Two images may not be encoded in one step: A stops before its second one, and so B is
    # decoding before A's prompt is through.
    engine.add(new_request("A", ["a", "b", 4], max_tokens=2, ignore_eos=True))
    engine.add(new_request("B", [2], max_tokens=4, ignore_eos=True))
    run_all(engine)
    assert runner.order == [
        [("A", 4), ("B", 2)],
        [("B", 1), ("A", 5)],
        [("A", 3)],  # 9 + 3 blocks for A and 3 + 1 for B are too many
        [("A", 1)],
        [("B", 4)],
        [("B", 1)],
    ]


def test_the_token_of_a_preempted_decode_goes_to_another(new_engine, new_request, run_all) -> None:
    lengths = {"a": 7, "b": 3, "m": 3}  # a and any other are too many rows for one step
    engine, runner = new_engine(num_blocks=17, block_size=1, max_num_batched_tokens=9)
    engine.add(new_request("A", ["a", "b", 5], lengths=lengths, max_tokens=2, ignore_eos=True))
    engine.add(new_request("M", [1, "m", 1], lengths=lengths, max_tokens=1))
    engine.add(new_request("B", [1], max_tokens=3, ignore_eos=True))
    run_all(engine)
    assert runner.order[:2] == [[("A", 7), ("M", 1), ("B", 1)], [("A", 8), ("M", 1)]]


def test_a_sequence_that_lacks_blocks_waits_for_older_ones_and_lets_nobody_pass(
    new_engine, new_request, run_all
) -> None:
    engine, runner = new_engine(
        num_blocks=10, block_size=1, max_num_batched_tokens=6, enable_prefix_caching=False
    )
    engine.add(new_request("A", [4], max_tokens=4, ignore_eos=True))
    engine.add(new_request("B", [6], max_tokens=2, ignore_eos=True))
    engine.add(new_request("C", [1], max_tokens=2, ignore_eos=True))
    run_all(engine)
    assert runner.order == [
        [("A", 4), ("B", 2)],
        [("A", 1)],  # B needs 4 blocks and 3 are free; C, which needs one, must not take it
        [("A", 1)],
        [("A", 1)],
        [("B", 4), ("C", 1)],
        [("B", 1), ("C", 1)],
    ]
    assert engine.stats().num_preemptions == 0


def test_rows_and_blocks_held_crosswise_do_not_stop_the_engine(
    new_engine, new_request, run_all
) -> None:
    """A lacks rows that B pins; B, inside its image, lacks blocks that A holds."""
    lengths = {"one": 5, "two": 4, "three": 7, "small": 3}
    engine, runner = new_engine(num_blocks=39, block_size=1, max_num_batched_tokens=8, max_rows=9)
    engine.add(new_request("R", ["small"], lengths=lengths, max_tokens=1))
    run_all(engine)  # now the features of `small` are there
    runner.order.clear()
    engine.add(new_request("A", [2, "one", "two", 20, "three"], lengths=lengths, max_tokens=1))
    engine.add(new_request("B", ["small", 9], lengths=lengths, max_tokens=1))
    sums = run_all(engine, max_steps=20)
    assert runner.order[:4] == [[("A", 7), ("B", 1)], [("A", 8)], [("A", 8)], [("A", 8)]]
    assert runner.order[4] == [("A", 7)]  # B was preempted: its pin is gone
    assert engine.stats().num_preemptions == 1
    assert all(output.finished for output in sums.values()) and len(sums) == 2


@pytest.mark.parametrize("max_tokens", [4, 5])
def test_a_request_over_the_pool_is_refused_when_it_comes(
    new_engine, new_request, run_all, max_tokens: int
) -> None:
    engine, _ = new_engine(num_blocks=2, block_size=5)
    request = new_request("A", [6], max_tokens=max_tokens)
    if max_tokens == 4:
        engine.add(request)
        assert run_all(engine)["A"].finished
    else:
        with pytest.raises(RequestError, match="6 \\+ 5 of 10 tokens") as error:
            engine.add(request)
        assert error.value.param == "max_tokens"
        assert not engine.has_work


@pytest.mark.parametrize("length", [8, 9])
def test_an_image_over_the_encoder_cache_is_refused_when_it_comes(
    new_engine, new_request, run_all, length: int
) -> None:
    engine, _ = new_engine(max_rows=8)
    request = new_request("A", ["a", "big"], lengths={"big": length})
    if length == 8:
        engine.add(request)
        assert run_all(engine)["A"].finished
    else:
        with pytest.raises(RequestError, match="image 1 exceeds .* 9 of 8 tokens"):
            engine.add(request)


def test_an_image_is_encoded_once_for_all_its_chunks(new_engine, new_request, run_all) -> None:
    engine, runner = new_engine(max_num_batched_tokens=3)
    engine.add(new_request("A", [2, "a", 2], lengths={"a": 10}))
    run_all(engine)
    assert runner.encoded == ["a"]
    assert runner.num_cut_items >= 3


def test_finished_sequences_leave_at_the_next_step(new_engine, new_request) -> None:
    engine, _ = new_engine()
    engine.add(new_request("A", [3], max_tokens=1))
    engine.step()
    assert engine.stats().num_used_blocks == 1
    assert engine.has_work
    assert engine.step() == []
    assert engine.stats().num_used_blocks == engine.stats().num_running == 0
    assert not engine.has_work


def test_shared_blocks_are_not_counted_on_when_younger_sequences_give_way(new_request) -> None:
    """A needs three blocks. B would free one: its other two are A's own."""
    cache = KVCache(num_blocks=5, block_size=2)
    scheduler = Scheduler(cache, EncoderCache(10, 10), max_num_batched_tokens=100, max_num_seqs=3)
    oldest, older, younger = (
        Sequence(new_request(name, [number], max_tokens=1))
        for name, number in (("O", 4), ("A", 10), ("B", 6))
    )
    oldest.token_ids = [100, 101, 102, 103]
    for sequence, num in ((oldest, 4), (older, 4), (younger, 1)):
        cache.adopt(sequence, cache.lookup(sequence))
        cache.append(sequence, num)
        cache.keep(sequence, sequence.num_computed_tokens, sequence.num_computed_tokens + num)
        sequence.num_computed_tokens += num
        sequence.status = SequenceStatus.RUNNING
        scheduler.running.append(sequence)
    assert younger.block_table[:2] == older.block_table
    assert cache.num_free_blocks == 0
    shares = scheduler.schedule().sequences
    assert [share.sequence for share in shares] == [younger]  # A waits, B's last token fits
    assert scheduler.num_preemptions == 0
