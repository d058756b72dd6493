"""Drafts are what followed the newest tokens where they stood last, and never a placeholder."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_engine.engine.prompt_lookup import PromptLookup
from mm_engine.sequence import Sequence
from sequences import make_item, make_sequence

IMAGE = 9


def propose(sequence: Sequence, num: int = 3, *, longest: int = 3, shortest: int = 1) -> list[int]:
    return list(PromptLookup(num, longest=longest, shortest=shortest).propose(sequence, num))


def rescan(sequence: Sequence, num: int, longest: int, shortest: int) -> list[int]:
    """The same by looking at everything, each time."""
    ids = sequence.token_ids
    is_text = [True] * len(ids)
    for item in sequence.request.items:
        for position in range(item.placeholder.offset, item.placeholder.end):
            is_text[position] = False
    for length in range(longest, shortest - 1, -1):
        newest = ids[len(ids) - length :]
        if length > len(ids) or not all(is_text[len(ids) - length :]):
            continue
        for end in range(len(ids) - 1, length - 1, -1):
            if ids[end - length : end] == newest and all(is_text[end - length : end + 1]):
                line = list(ids)
                while len(line) - len(ids) < num:
                    place = end + len(line) - len(ids)
                    if place < len(is_text) and not is_text[place]:
                        break
                    line.append(line[place])
                return line[len(ids) :]
    return []


@pytest.mark.parametrize(
    ("ids", "draft"),
    [
        pytest.param((1, 2, 3, 4, 5, 1, 2), [3, 4, 5], id="what-followed"),
        pytest.param((1, 2, 3, 4, 5, 7, 2), [3, 4, 5], id="one-token-in-common"),
        pytest.param((1, 2, 3, 9, 2, 4, 8, 1, 2), [3, 9, 2], id="the-longest-wins"),
        pytest.param((1, 2, 3, 0, 1, 2, 4, 0, 1, 2), [4, 0, 1], id="of-equals-the-last-wins"),
        pytest.param((1, 2, 3, 4), [], id="never-seen"),
        pytest.param((1,), [], id="alone"),
        pytest.param((5, 5), [5, 5, 5], id="repeats-itself"),
        pytest.param((1, 2, 1, 2), [1, 2, 1], id="a-period-of-two"),
    ],
)
def test_the_draft_is_what_followed_before(ids: tuple[int, ...], draft: list[int]) -> None:
    assert propose(make_sequence(ids)) == draft
    assert propose(make_sequence(ids[:1], ids[1:])) == draft  # an answer that quotes itself


def test_shorter_ngrams_than_asked_for_are_not_looked_up() -> None:
    assert propose(make_sequence((1, 2, 3, 4, 5, 2, 3)), shortest=3) == []
    assert propose(make_sequence((1, 2, 3, 4, 5, 2, 3)), shortest=2) == [4, 5, 2]


@pytest.mark.parametrize("num", [-3, 0, 1, 2, 9])
def test_a_draft_is_no_longer_than_there_is_room_for(num: int) -> None:
    lookup = PromptLookup(4, longest=2, shortest=1)
    assert len(lookup.propose(make_sequence((7, 7, 7)), num)) == max(0, min(num, 4))


@pytest.mark.parametrize(
    ("ids", "draft"),
    [
        pytest.param((1, 2, 3, IMAGE, IMAGE, 4, 1, 2), [3], id="it-ends-before-one"),
        pytest.param((1, 2, 0, IMAGE, IMAGE, 4, 2, 0), [], id="one-follows"),
        pytest.param((2, 3, 1, IMAGE, IMAGE, 1, 0, 1), [0, 1, 0], id="one-follows-the-first"),
        pytest.param((6, 7, 8, IMAGE, IMAGE, 5, IMAGE, 5), [IMAGE, 5, IMAGE], id="text-like-one"),
    ],
)
def test_placeholders_are_no_text(ids: tuple[int, ...], draft: list[int]) -> None:
    """An n-gram of equal ids, one of them a placeholder's, would stand for another picture."""
    sequence = make_sequence(ids, items=(make_item("a", 3, 2),))
    assert propose(sequence, longest=2) == draft


@pytest.mark.parametrize(("shortest", "draft"), [(2, []), (1, [3, 1])])
def test_an_ngram_across_a_placeholder_is_none(shortest: int, draft: list[int]) -> None:
    items = (make_item("a", 1, 1, 0), make_item("b", 5, 1, 1))
    sequence = make_sequence((1, IMAGE, 2, 3, 1, IMAGE, 2), items=items)
    assert propose(sequence, longest=3, shortest=shortest) == draft


@st.composite
def growing(draw: st.DrawFn) -> tuple[Sequence, list[list[int]]]:
    """A sequence with images, and what is appended to it, piece by piece."""
    ids: list[int] = []
    items = []
    for number in range(draw(st.integers(0, 4))):
        ids += draw(st.lists(st.integers(0, 2), max_size=6))
        length = draw(st.integers(1, 3))
        items.append(make_item(str(number), len(ids), length, number))
        ids += [1] * length  # a placeholder's id may be text elsewhere
    ids += draw(st.lists(st.integers(0, 2), max_size=6))
    pieces = draw(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), max_size=8))
    return make_sequence(tuple(ids or [0]), items=tuple(items)), pieces


@settings(max_examples=500)
@given(growing(), st.integers(1, 5), st.integers(1, 4), st.integers(0, 3))
def test_the_index_finds_what_a_rescan_finds(
    grown: tuple[Sequence, list[list[int]]], num: int, shortest: int, more: int
) -> None:
    sequence, pieces = grown
    lookup = PromptLookup(num, longest=shortest + more, shortest=shortest)
    for piece in [[], *pieces]:
        sequence.token_ids += piece
        expected = rescan(sequence, num, shortest + more, shortest)
        assert list(lookup.propose(sequence, num)) == expected
        assert list(lookup.propose(sequence, num)) == expected  # asked again, the same


def test_a_token_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cost of a step must not grow with what came before it."""

    class Counting(list[int]):
        num_read = 0

        def __getitem__(self, place):  # type: ignore[no-untyped-def]
            got = super().__getitem__(place)
            Counting.num_read += len(got) if isinstance(got, list) else 1
            return got

    sequence = make_sequence(tuple(range(1000)))
    sequence.token_ids = Counting(sequence.token_ids)
    lookup = PromptLookup(5, longest=4, shortest=2)
    lookup.propose(sequence, 5)
    Counting.num_read = 0
    for number in range(100):
        sequence.token_ids.append(500 + number)
        lookup.propose(sequence, 5)
    assert 0 < Counting.num_read < 100 * 40
