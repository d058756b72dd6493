"""What the front believes the engine process to have, it has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_engine.engine import wire
from mm_engine.engine.sent_tensors import SentTensors
from mm_engine.request import Item, PlaceholderRange, Request
from mm_engine.sampling_params import SamplingParams

SIZES = {"a": 1, "b": 2, "c": 3, "d": 6, "e": 9, "f": 0}  # of each image's tensor, 4 bytes a number
BUDGET = 32


def request_of(keys: str) -> Request:
    items = tuple(
        Item(
            PlaceholderRange("image", i, i, 1),
            key,
            {"x": torch.full((SIZES[key],), float(ord(key)))},
        )
        for i, key in enumerate(keys)
    )
    return Request("r", (0,) * len(keys), SamplingParams(), items)


class Line:
    """The two ends of the line to the engine process, and what went over it."""

    def __init__(self, budget: int) -> None:
        self.sent = SentTensors(budget)
        self.kept: dict[str, wire.Tensors] = {}

    def send(self, keys: str) -> int:
        """Send a request and read it; returns the bytes of tensors that were sent."""
        request, frames = request_of(keys), list[wire.Frame]()
        message = wire.encode(wire.Add(wire.pack_request(request, frames, self.sent)), frames)
        read = wire.decode_to_engine(message)
        assert isinstance(read, wire.Add)
        got = wire.unpack_request(read.request, message, self.kept)
        for item, wanted in zip(got.items, request.items, strict=True):
            assert item.content_key == wanted.content_key
            assert torch.equal(item.tensors["x"], wanted.tensors["x"])
        return sum(memoryview(frame).nbytes for frame in frames)


def test_known_tensors_are_not_sent_again() -> None:
    line = Line(BUDGET)
    assert [line.send(keys) for keys in ("ab", "ba", "abc", "aa")] == [12, 0, 12, 0]
    assert (line.sent.num_queries, line.sent.num_hits) == (9, 6)


def test_with_a_budget_of_zero_all_are_sent_each_time() -> None:
    line = Line(0)
    assert [line.send("abf") for _ in range(2)] == [12, 12]
    assert line.kept == {}


def test_what_is_larger_than_the_budget_is_not_kept_and_drives_nothing_out() -> None:
    line = Line(BUDGET)
    line.send("ab")
    assert line.send("e") == line.send("e") == 36
    assert line.send("ab") == 0


@given(
    st.lists(
        st.one_of(st.text("abcdef", min_size=1, max_size=5), st.sampled_from("ABCDEF")), max_size=40
    )
)
def test_both_ends_agree_whatever_comes(messages: list[str]) -> None:
    line = Line(BUDGET)
    for keys in messages:
        if keys.isupper():  # its request failed
            line.sent.drop(keys.lower())
            continue
        line.send(keys)
        assert set(line.kept) == set(line.sent._sizes)
        size = sum(tensors["x"].nbytes for tensors in line.kept.values())
        assert size == line.sent.num_bytes <= BUDGET


def test_the_least_recently_used_gives_way() -> None:
    line = Line(BUDGET)
    for keys in ("ab", "a", "d"):  # 12 and 24 bytes
        line.send(keys)
    assert set(line.kept) == {"a", "d"}


def test_what_failed_is_forgotten_by_both() -> None:
    line = Line(BUDGET)
    line.send("ab")
    line.sent.drop("a")
    line.sent.drop("nothing of this name")
    assert line.send("b") == 0
    assert set(line.kept) == {"b"}
    assert line.send("a") == 4


def test_nothing_is_promised_of_a_request_that_cannot_be_packed() -> None:
    line = Line(BUDGET)
    broken = torch.zeros(2).to_sparse()
    good, bad = (
        request_of("a").items[0],
        Item(PlaceholderRange("image", 1, 1, 1), "z", {"x": broken}),
    )
    with pytest.raises(Exception, match=r".*"):
        wire.pack_request(Request("r", (0, 0), SamplingParams(), (good, bad)), [], line.sent)
    assert line.send("a") == 4
