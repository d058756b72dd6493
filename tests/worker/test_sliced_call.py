"""A call in slices of time: as good as whole, one at a time, and no thread is left behind."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mm_engine.worker import sliced_call
from mm_engine.worker.sliced_call import SlicedCall

PIECE = 1.0  # seconds of the clock
PAUSE = 0.1  # real seconds in which what must rest could go on


class Clock:
    """Goes on only where a `Slow` computes: never more than one thread does."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced_call, "time", CLOCK)


class Slow(nn.Module):
    """Takes a while."""

    def forward(self, x: Tensor) -> Tensor:
        CLOCK.now += PIECE
        return x + 1


def stack(number: int) -> list[nn.Module]:
    return [Slow() for _ in range(number)]


def apply(modules: list[nn.Module]) -> Tensor:
    x = torch.zeros(())
    for module in modules:
        x = module(x)
    return x


class Applied(SlicedCall):
    """Applies modules; `results` has what came of it."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.results: list[float] = []
        super().__init__(lambda: self.results.append(apply(modules).item()), modules)


@pytest.mark.parametrize(
    ("num_pieces", "ends"),
    [
        (4.0, [4, 8, 12, 16, 20, 20]),
        (3.6, [4, 8, 12, 16, 20, 20]),
        (3.4, [3, 6, 9, 12, 15, 18, 20]),
    ],
)
@pytest.mark.usefixtures("clock")
def test_each_slice_ends_where_its_time_is_nearest(num_pieces: float, ends: list[int]) -> None:
    modules, start = stack(20), CLOCK.now
    call, passed = Applied(modules), []
    while not call.ended:
        call.run(num_pieces * PIECE)
        passed.append((CLOCK.now - start) / PIECE)
    assert passed == ends  # the last may have just what comes behind the last place to rest
    assert call.results == [20]


@pytest.mark.usefixtures("clock")
def test_between_slices_nothing_runs() -> None:
    modules, done = stack(10), []
    for module in modules:
        module.register_forward_hook(lambda *_: done.append(1))
    call = Applied(modules)
    time.sleep(PAUSE)
    assert not done, "it doesn't begin by itself"
    call.run(2 * PIECE)
    assert len(done) == 2
    time.sleep(PAUSE)
    assert len(done) == 2


@pytest.mark.usefixtures("clock")
def test_the_last_slice_has_no_end() -> None:
    modules = stack(10)
    call = Applied(modules)
    call.run(PIECE)
    assert not call.ended
    call.run()
    assert call.ended
    call.run()  # an ended call has nothing to do
    assert call.results == [10]


@pytest.mark.usefixtures("clock")
def test_what_the_call_raises_is_kept_and_the_thread_ends() -> None:
    modules = stack(3)

    def fail() -> None:
        apply(modules)
        raise SystemExit("a plugin's wish")

    call = SlicedCall(fail, modules)
    while not call.ended:
        call.run(PIECE)
    assert isinstance(call.error, SystemExit)
    call._thread.join(30)
    assert not call._thread.is_alive()
    assert all(not module._forward_hooks for module in modules), "the places to rest are gone"


def test_a_module_that_takes_no_hooks_fails_the_call_and_holds_up_nobody() -> None:
    class Refusing(nn.Module):
        def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no hooks here")

    call = Applied([*stack(1), Refusing()])
    call.run()
    assert call.ended and isinstance(call.error, RuntimeError)


@pytest.mark.parametrize("num_slices", [0, 1])
def test_a_call_that_is_cancelled_unwinds_where_it_rests(num_slices: int) -> None:
    modules, done, left = stack(10), [], []
    for module in modules:
        module.register_forward_hook(lambda *_: done.append(1))

    def call_them() -> None:
        try:
            apply(modules)
        except Exception:  # a plugin may catch what is its own
            left.append("caught")
        finally:
            left.append("unwound")

    call = SlicedCall(call_them, modules)
    for _ in range(num_slices):
        call.run(0.0)
    call.cancel()
    assert call.ended
    assert len(done) == num_slices
    assert left == ["unwound"] * num_slices
    call._thread.join(30)
    assert not call._thread.is_alive()


@pytest.mark.usefixtures("clock")
def test_others_may_use_the_modules_meanwhile() -> None:
    modules = stack(6)
    call = Applied(modules)
    call.run(PIECE)
    assert not call.ended
    assert apply(modules).item() == 6, "it doesn't rest for the call's slices"
    call.run()
    assert call.results == [6]
