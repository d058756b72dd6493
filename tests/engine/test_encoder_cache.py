from __future__ import annotations

from collections.abc import Callable

import pytest

from mm_engine.engine.encoder_cache import EncoderCache
from mm_engine.request import Request
from mm_engine.sequence import Sequence

Plan = tuple[list[str], list[str]]


class Steps:
    """Plans chunks and computes them, as the scheduler and the engine do."""

    def __init__(self, max_rows: int, max_step_rows: int = 100) -> None:
        self.cache = EncoderCache(max_rows, max_step_rows)

    def plan(self, *shares: tuple[Sequence, int]) -> tuple[list[int], Plan]:
        """One step: how far each share got, and (encoded, evicted) content keys."""
        self.cache.begin_step()
        lengths = []
        for sequence, wanted in shares:
            lengths.append(self.cache.cut(sequence, wanted))
            self.cache.take(sequence, lengths[-1])
        encode, evict = self.cache.end_step()
        for (sequence, _), length in zip(shares, lengths, strict=True):
            sequence.num_computed_tokens += length
        return lengths, ([item.content_key for item in encode], list(evict))


@pytest.fixture(scope="session")
def sequence_of(new_request: Callable[..., Request]) -> Callable[..., Sequence]:
    return lambda *parts, **lengths: Sequence(new_request("r", list(parts), lengths=lengths))


def test_an_item_is_encoded_when_a_chunk_first_touches_it_and_only_then(sequence_of) -> None:
    steps, sequence = Steps(max_rows=4), sequence_of(3, "a", 2)
    encoded = [steps.plan((sequence, 2))[1][0] for _ in range(5)]
    assert encoded == [[], ["a"], [], [], []]  # positions 3 to 6 are the image's


def test_two_sequences_with_one_image_share_its_features(sequence_of) -> None:
    steps, first, second = Steps(max_rows=4), sequence_of("a", 1), sequence_of(1, "a")
    assert steps.plan((first, 5), (second, 5)) == ([5, 5], (["a"], []))
    assert (steps.cache.num_encodes, steps.cache.num_hits) == (1, 1)


def test_one_image_twice_in_a_prompt_takes_its_rows_once(sequence_of) -> None:
    steps, sequence = Steps(max_rows=4), sequence_of("a", 1, "a")
    assert steps.plan((sequence, 9)) == ([9], (["a"], []))
    assert steps.cache.num_rows == 4


def test_features_stay_for_a_later_request(sequence_of) -> None:
    steps = Steps(max_rows=8)
    steps.plan((sequence_of("a"), 4))
    assert steps.plan((sequence_of("a"), 4)) == ([4], ([], []))


def test_the_least_recently_used_features_give_way(sequence_of) -> None:
    steps = Steps(max_rows=8)
    for name in "aba":
        steps.plan((sequence_of(name), 4))
    assert steps.plan((sequence_of("c"), 4)) == ([4], (["c"], ["b"]))


def test_features_in_use_never_give_way(sequence_of) -> None:
    steps, inside = Steps(max_rows=8), sequence_of("a", 1)
    steps.plan((inside, 2))  # in the middle of image a
    steps.plan((sequence_of("b"), 4))
    assert steps.plan((sequence_of("c"), 4)) == ([4], (["c"], ["b"]))
    assert steps.plan((sequence_of(2, "d", d=5), 7)) == ([2], ([], []))  # 4 + 5 rows are too many
    assert steps.plan((inside, 3)) == ([3], ([], []))


def test_what_a_chunk_needs_does_not_give_way_to_what_it_lacks(sequence_of) -> None:
    steps = Steps(max_rows=8)
    for name in "ab":
        steps.plan((sequence_of(name), 4))
    # a is the least recently used, but the chunk that brings c needs it as well.
    assert steps.plan((sequence_of("c", "a"), 8)) == ([8], (["c"], ["b"]))


def test_a_chunk_is_cut_before_the_image_that_does_not_fit(sequence_of) -> None:
    steps, sequence = Steps(max_rows=4), sequence_of(1, "a", 2, "b", 1)
    assert steps.plan((sequence, 12)) == ([7], (["a"], []))
    assert steps.plan((sequence, 5)) == ([5], (["b"], ["a"]))


def test_rows_encoded_in_a_step_are_bounded_but_one_item_always_goes(sequence_of) -> None:
    steps, sequence = Steps(max_rows=100, max_step_rows=6), sequence_of("a", "b", "big", big=9)
    lengths = [steps.plan((sequence, 17 - sequence.num_computed_tokens))[0] for _ in range(3)]
    assert lengths == [[4], [4], [9]]


def test_once_a_sequence_lacks_rows_no_younger_one_pins_more(sequence_of) -> None:
    steps, holder = Steps(max_rows=8), sequence_of("a", 1)
    steps.plan((sequence_of("c", c=3), 3))
    steps.plan((holder, 2))
    older, younger = sequence_of("big", big=8), sequence_of("c", c=3)
    same = sequence_of("a")
    assert steps.plan((older, 8), (younger, 3), (same, 4))[0] == [0, 0, 4]
    assert steps.plan((younger, 3))[0] == [3]


def test_pins_are_dropped_when_a_sequence_is_preempted(sequence_of) -> None:
    steps, inside = Steps(max_rows=4), sequence_of("a", 1)
    steps.plan((inside, 2))
    assert steps.plan((sequence_of("b"), 4))[0] == [0]
    steps.cache.release(inside)
    assert steps.plan((sequence_of("b"), 4)) == ([4], (["b"], ["a"]))


def test_discarded_features_are_encoded_again_unless_somebody_uses_them(sequence_of) -> None:
    steps, inside = Steps(max_rows=8), sequence_of("a", 1)
    steps.plan((inside, 2), (sequence_of("b"), 4))
    steps.cache.begin_step()
    steps.cache.discard(["a", "b", "never seen"])
    assert steps.plan((sequence_of("a", "b"), 8)) == ([8], (["b"], ["b"]))


def test_a_sequence_that_begins_inside_an_image_gets_nothing_where_its_features_cannot_be_had(
    sequence_of,
) -> None:
    steps, other = Steps(max_rows=4), sequence_of("b", 1)
    steps.plan((other, 2))  # pins b
    inside = sequence_of("a", 1)
    inside.num_computed_tokens = 2  # the KV cache holds the first half of its image
    steps.cache.begin_step()
    assert steps.cache.cut(inside, 3) == 0


def test_an_image_whose_rest_is_being_encoded_does_not_give_way_in_that_step(sequence_of) -> None:
    cache = EncoderCache(8, 100)
    first, second = sequence_of("a"), sequence_of("b", b=8)
    cache.begin_step()
    cache.slice_items()
    assert cache.cut(first, 4) == 0
    assert cache.next_slice(wanted=True) is first.request.items[0]
    assert cache.end_step() == ((), ())
    cache.begin_step()
    cache.finish_slices()
    assert cache.cut(second, 8) == 0, "its rows are taken until the step is over"
    assert cache.end_step() == (first.request.items, ())
    cache.begin_step()
    assert cache.cut(second, 8) == 8
    cache.take(second, 8)
    assert cache.end_step() == (second.request.items, ("a",))
