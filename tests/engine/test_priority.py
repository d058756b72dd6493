"""Ranks: a better priority goes first, and takes the seat and the blocks of worse ones."""

from __future__ import annotations


def test_the_lower_priority_number_goes_first(new_engine, new_request, run_all) -> None:
    engine, runner = new_engine(max_num_seqs=1)
    for name, priority in (("A", 0), ("B", 3), ("C", 0), ("D", -2), ("E", -2)):
        engine.add(new_request(name, [2], max_tokens=1, priority=priority))
    run_all(engine)
    assert [request_id for ((request_id, _),) in runner.order] == list("DEACB")


def test_a_better_priority_takes_the_seat_of_a_worse_one_never_of_its_own(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine(max_num_seqs=2, enable_prefix_caching=False)
    requests = {
        "A": new_request("A", [2], max_tokens=6, ignore_eos=True, priority=1),
        "B": new_request("B", [2, "b"], max_tokens=6, ignore_eos=True, priority=1),
        "C": new_request("C", [2, "c"], max_tokens=2, ignore_eos=True, priority=1),
        "D": new_request("D", [3, "d"], max_tokens=2, ignore_eos=True),
    }
    for name in "AB":
        engine.add(requests[name])
    sums = {output.request_id: output for output in engine.step()}
    for name in "CD":
        engine.add(requests[name])
    for request_id, output in run_all(engine).items():
        if request_id in sums:
            sums[request_id].extend(output)
        else:
            sums[request_id] = output
    order = ["".join(request_id for request_id, _ in step) for step in runner.order]
    assert order[:4] == ["AB", "AD", "DA", "AB"], "B gave way to D, and came back before C"
    assert engine.stats().num_preemptions == 1
    for name, request in requests.items():
        assert sums[name].outputs[0].token_ids == expected(request, 0, runner.vocab)


def test_a_better_priority_takes_the_blocks_of_worse_ones_if_they_suffice(
    new_engine, new_request, run_all
) -> None:
    engine, runner = new_engine(num_blocks=8, block_size=4, enable_prefix_caching=False)
    engine.add(new_request("A", [11], max_tokens=5, ignore_eos=True))
    engine.add(new_request("B", [11], max_tokens=5, ignore_eos=True, priority=1))
    engine.step()
    engine.add(new_request("C", [15], max_tokens=1, priority=-1))
    engine.add(new_request("D", [23], max_tokens=1, priority=0))
    engine.step()
    assert [request_id for request_id, _ in runner.order[1]] == ["A", "C"]
    assert engine.stats().num_preemptions == 1
    engine.step()
    # Even with B's blocks, which it no longer has, D finds no room beside A.
    assert [request_id for request_id, _ in runner.order[2]] == ["A"]
    run_all(engine)
    assert [step[0][0] for step in runner.order if len(step) == 1][-1] == "B"


def test_a_worse_priority_waits_while_better_ones_come(new_engine, new_request) -> None:
    engine, runner = new_engine(max_num_seqs=1)
    engine.add(new_request("last", [2], max_tokens=2, ignore_eos=True, priority=9))
    for i in range(20):
        engine.add(new_request(f"r{i}", [2], max_tokens=1))
        engine.step()
    assert "last" not in {request_id for step in runner.order for request_id, _ in step}
    while engine.has_work:
        engine.step()
    assert runner.order[-1][0][0] == "last"
