"""What was computed for one request serves another that begins alike, and no other."""

from __future__ import annotations

import pytest

from mm_engine.engine.kv_cache import KVCache
from mm_engine.request import Item, PlaceholderRange, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import Sequence

LENGTHS = {"a": 6, "b": 6, "c": 3}


def test_second_request_computes_only_what_is_new(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine()
    first = new_request("A", [3, "a", 7], lengths=LENGTHS)
    second = new_request("B", [3, "a", 7, 5], lengths=LENGTHS)
    engine.add(first)
    run_all(engine)
    before = runner.num_computed
    engine.add(second)
    answer = run_all(engine)["B"]
    assert answer.outputs[0].token_ids == expected(second, 0, runner.vocab)
    assert answer.num_cached_tokens == 16  # the four full blocks of 3 + 6 + 7 tokens
    assert runner.num_computed - before == 21 - 16 + 3
    assert runner.encoded == ["a"]
    stats = engine.stats()
    assert (stats.num_prefix_queries, stats.num_prefix_hits) == (16 + 21, 16)


def test_switched_off_nothing_is_shared(new_engine, new_request, run_all) -> None:
    engine, runner = new_engine(enable_prefix_caching=False)
    for name in "AB":
        engine.add(new_request(name, [3, "a", 7], lengths=LENGTHS))
        assert run_all(engine)[name].num_cached_tokens == 0
    assert runner.num_computed == 2 * (16 + 3)
    stats = engine.stats()
    assert stats.num_prefix_queries == stats.num_prefix_hits == stats.num_kept_blocks == 0


def test_whole_prompt_in_the_cache_leaves_its_last_token_to_compute(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine()
    for name in "AB":
        request = new_request(name, [8], max_tokens=2, ignore_eos=True)
        engine.add(request)
        output = run_all(engine)[name]
        assert output.outputs[0].token_ids == expected(request, 0, runner.vocab)
    assert runner.order == [[("A", 8)], [("A", 1)], [("B", 4)], [("B", 1)]]


def test_conversation_goes_on_behind_its_own_answer(new_engine, new_request, run_all) -> None:
    engine, runner = new_engine()
    first = new_request("A", [6, "c"], lengths=LENGTHS, max_tokens=8, ignore_eos=True)
    engine.add(first)
    answer = run_all(engine)["A"].outputs[0].token_ids
    params = SamplingParams(max_tokens=1, temperature=0.0)
    ids = first.prompt_token_ids + tuple(answer) + (7, 8, 9)
    engine.add(Request("B", ids, params, first.items))
    # 9 + 8 tokens, of which the last was never computed: 16 in four full blocks.
    assert run_all(engine)["B"].num_cached_tokens == 16
    assert runner.order[-1] == [("B", 4)]


def test_what_one_step_computes_is_not_computed_twice_in_it(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine()
    requests = [
        new_request(name, [9, number + 1], max_tokens=2, ignore_eos=True)
        for number, name in enumerate("ABC")
    ]
    for request in requests:
        engine.add(request)
    sums = run_all(engine)
    assert runner.order[0] == [("A", 10)]
    assert runner.order[1] == [("A", 1), ("B", 3), ("C", 4)]
    for request in requests:
        output = sums[request.request_id].outputs[0]
        assert output.token_ids == expected(request, 0, runner.vocab)


def test_completions_of_one_request_share_its_prompt(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine()
    request = new_request("A", [9], n=3, max_tokens=2, ignore_eos=True)
    engine.add(request)
    outputs = run_all(engine)["A"].outputs
    assert [output.token_ids for output in outputs] == [
        expected(request, index, runner.vocab) for index in range(3)
    ]
    assert runner.order[:2] == [[("A", 9)], [("A", 1)] * 3]


def test_prompt_that_waits_for_another_does_not_wait_for_its_failure(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine()
    for name in "AB":
        engine.add(new_request(name, [9], max_tokens=1))
    runner.raises["A"] = RuntimeError("no")
    sums = run_all(engine)
    assert sums["A"].error is not None
    request = new_request("B", [9], max_tokens=1)
    assert sums["B"].outputs[0].token_ids == expected(request, 0, runner.vocab)
    assert sums["B"].num_cached_tokens == 0


def test_prefix_that_ends_inside_an_image_encodes_it_again_only_if_it_is_gone(
    new_engine, new_request, run_all, expected
) -> None:
    engine, runner = new_engine(max_rows=6)
    engine.add(new_request("A", [3, "a", 7], lengths=LENGTHS, max_tokens=1))
    run_all(engine)
    for name, encoded in (("B", ["a"]), ("C", ["a", "b", "a"])):
        if name == "C":  # another image takes the place of a's features
            engine.add(new_request("D", ["b"], lengths=LENGTHS, max_tokens=1))
            run_all(engine)
        # The same nine tokens, then nothing: two full blocks, and one token of the image is left.
        request = new_request(name, [3, "a"], lengths=LENGTHS, max_tokens=1)
        engine.add(request)
        answer = run_all(engine)[name]
        assert answer.num_cached_tokens == 8
        assert answer.outputs[0].token_ids == expected(request, 0, runner.vocab)
        assert runner.encoded == encoded


def test_least_recently_used_gives_way_first_and_ends_of_prompts_before_their_beginnings(
    new_engine, new_request, run_all
) -> None:
    engine, _ = new_engine(num_blocks=6, block_size=2)

    def cached_tokens(image: str) -> int:
        name = f"{image}{engine.stats().num_steps}"
        engine.add(new_request(name, [image], lengths={"a": 5, "b": 5}, max_tokens=1))
        return run_all(engine)[name].num_cached_tokens

    assert [cached_tokens(image) for image in "ab"] == [0, 0]
    assert engine.stats().num_kept_blocks == 4  # two of each
    engine.add(new_request("C", [5], max_tokens=1))  # two blocks hold nothing, the third is a's
    run_all(engine)
    assert engine.kv_cache.num_evictions == 1
    assert cached_tokens("a") == 2  # its first block; what it computes takes C's third and b's
    assert cached_tokens("b") < 4


def test_preempted_sequence_finds_what_it_had(new_engine, new_request, run_all, expected) -> None:
    engine, runner = new_engine(num_blocks=9, block_size=2, max_num_seqs=2)
    requests = [
        new_request(name, [number, "a"], lengths={"a": 4}, max_tokens=6, ignore_eos=True)
        for number, name in ((1, "A"), (2, "B"))
    ]
    for request in requests:
        engine.add(request)
    sums = run_all(engine)
    assert engine.stats().num_preemptions > 0
    recomputed = runner.num_computed - sum(5 + r for r in (5, 6))
    assert 0 < recomputed < 6  # without the cache all that B had
    for request in requests:
        answer = sums[request.request_id]
        assert answer.outputs[0].token_ids == expected(request, 0, runner.vocab)
        assert answer.num_cached_tokens == 0  # recomputing after preemption is no hit


def sequence_of(ids: tuple[int, ...], *items: tuple[str, int, int], salt: str = "") -> Sequence:
    placed = tuple(
        Item(PlaceholderRange("image", i, offset, length), key, {})
        for i, (key, offset, length) in enumerate(items)
    )
    params = SamplingParams(max_tokens=1)
    return Sequence(Request("r", ids, params, placed, (), salt))


IDS = tuple(range(9))
BASE = sequence_of(IDS, ("x", 2, 4))
OTHERS = {
    "another token": sequence_of((*IDS[:7], 99, 8), ("x", 2, 4)),
    "another token far in front": sequence_of((99, *IDS[1:]), ("x", 2, 4)),
    "another image": sequence_of(IDS, ("y", 2, 4)),
    "no image": sequence_of(IDS),
    "the image one token later": sequence_of(IDS, ("x", 3, 4)),
    "the image one token longer": sequence_of(IDS, ("x", 2, 5)),
    "a second image": sequence_of(IDS, ("x", 2, 4), ("x", 6, 2)),
    "another salt": sequence_of(IDS, ("x", 2, 4), salt="mine"),
    "two keys that run together": sequence_of(IDS, ("", 2, 4), salt="x"),
}


def cache_after(sequence: Sequence, **options: object) -> KVCache:
    cache = KVCache(16, 4, **options)  # type: ignore[arg-type]
    cache.append(sequence, 9)
    cache.keep(sequence, 0, 9)
    return cache


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_is_not_found(name: str) -> None:
    cache = cache_after(sequence_of(IDS, ("x", 2, 4)))
    assert len(cache.lookup(BASE)) == 2  # the positive control
    other = OTHERS[name]
    equal_first = name in ("another token", "a second image")
    assert len(cache.lookup(other)) == (1 if equal_first else 0)


def test_another_model_or_plugin_version_has_other_keys() -> None:
    cache = cache_after(sequence_of(IDS), model="checkpoint · mm-llava 0.1.0")
    again = cache_after(sequence_of(IDS), model="checkpoint · mm-llava 0.1.0")
    other = cache_after(sequence_of(IDS), model="checkpoint · mm-llava 0.1.1")
    assert set(cache._block_of_key) == set(again._block_of_key)
    assert not set(cache._block_of_key) & set(other._block_of_key)


def test_keys_are_whole_digests() -> None:
    assert {len(key) for key in cache_after(sequence_of(IDS))._block_of_key} == {32}
