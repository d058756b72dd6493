from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_engine.engine.stop_strings import StopStrings


def feed_all(
    stops: list[str], text_pieces: list[str], *, include: bool = False
) -> tuple[str, str | None]:
    finder = StopStrings(tuple(stops), include=include)
    text = ""
    for piece in text_pieces:
        released, stop = finder.feed(piece)
        text += released
        if stop is not None:
            return text, stop
    return text + finder.flush(), None


def by_definition(stops: list[str], text: str) -> tuple[str, str | None]:
    """Character by character: the first end of a stop string, the longest that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return text[: end - len(stop)], stop
    return text, None


@pytest.mark.parametrize(
    ("stops", "text_pieces", "wanted"),
    [
        pytest.param(["STOP"], ["a ST", "OP b"], ("a ", "STOP"), id="across"),
        pytest.param(["STOP"], ["a STOP b"], ("a ", "STOP"), id="inside"),
        pytest.param(["aab"], ["aa", "ab"], ("a", "aab"), id="begins-twice"),
        pytest.param(["abc", "b"], ["abc"], ("a", "b"), id="one-in-another"),
        pytest.param(["bc", "abc"], ["abc"], ("", "abc"), id="same-end"),
        pytest.param(["abcd", "bx"], ["abc", "bx"], ("abc", "bx"), id="held-for-another"),
        pytest.param(["ab"], ["a"], ("a", None), id="never-completed"),
        pytest.param([], ["any", "thing"], ("anything", None), id="none"),
    ],
)
def test_text_ends_before_the_stop_string(
    stops: list[str], text_pieces: list[str], wanted: tuple[str, str | None]
) -> None:
    assert feed_all(stops, text_pieces) == wanted


def test_only_text_that_may_become_a_stop_string_is_held_back() -> None:
    finder = StopStrings(("STOP",))
    assert [finder.feed(piece)[0] for piece in ("go S", "T", "AY", "S", " on")] == [
        "go ",
        "",
        "STAY",
        "",
        "S on",
    ]


def test_the_stop_string_can_be_kept() -> None:
    assert feed_all(["STOP"], ["a ST", "OP b"], include=True) == ("a STOP", "STOP")


def test_stop_strings_completed_too_early_are_text() -> None:
    finder = StopStrings(("ab",))
    assert finder.feed("xab", may_stop=False) == ("xab", None)
    assert finder.feed("a", may_stop=False) == ("", None)
    assert finder.feed("b ab") == ("", "ab")  # begun early, completed in time


def test_a_stop_string_completed_too_early_is_not_held_back() -> None:
    finder = StopStrings(("ab", "zzzz"))
    assert finder.feed("xab", may_stop=False) == ("xab", None)


cut_text = st.lists(st.text("ab", max_size=5), max_size=8)
stop_lists = st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3)


@given(stop_lists, cut_text)
def test_text_is_the_same_however_it_is_cut(stops: list[str], text_pieces: list[str]) -> None:
    assert feed_all(stops, text_pieces) == by_definition(stops, "".join(text_pieces))


@given(stop_lists, cut_text)
def test_nothing_is_held_that_could_be_passed_on(stops: list[str], text_pieces: list[str]) -> None:
    finder, text, passed = StopStrings(tuple(stops)), "", ""
    for piece in text_pieces:
        released, stop = finder.feed(piece)
        if stop is not None:
            break
        text, passed = text + piece, passed + released
        held = text[len(passed) :]
        assert not held or any(stop.startswith(held) for stop in stops)
