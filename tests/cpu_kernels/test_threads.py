"""The pool of threads that the C++ kernels share: asleep when idle, right whoever calls when."""

from __future__ import annotations

import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mm_engine_kernels import _cpu, ops
from mm_engine_kernels.cpu.extension import num_threads, set_num_threads
from mm_engine_kernels.cpu.linear import PackedLinear, pack_linear
from torch import Tensor

PATIENCE = 60.0  # seconds: the machine may be busy


@pytest.fixture(autouse=True)
def _same_number_afterwards() -> Iterator[None]:
    before = num_threads()
    yield
    set_num_threads(before)


@pytest.fixture(scope="module")
def layer() -> PackedLinear:
    """Of 32 chunks where rows are few."""
    packed = pack_linear(torch.randn(1024, 512, generator=torch.Generator().manual_seed(1)))
    assert packed is not None
    return packed


@pytest.fixture(scope="module")
def rows() -> Tensor:
    """So many that other Python threads run while they are multiplied."""
    return torch.randn(512, 512, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def expected(layer: PackedLinear, rows: Tensor) -> Tensor:
    """What one thread gives; which thread takes which part doesn't change a bit of it."""
    set_num_threads(1)
    return layer(rows)


def until(done: Callable[[], bool]) -> bool:
    end = time.monotonic() + PATIENCE
    while not done():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def test_workers_sleep_when_there_is_nothing_to_do(layer: PackedLinear, rows: Tensor) -> None:
    set_num_threads(4)
    for _ in range(3):  # and again after they were woken
        layer(rows)
        before = time.process_time()
        assert until(lambda: _cpu.num_asleep() == 3)
        time.sleep(0.2)
        assert time.process_time() - before < 0.1


@pytest.mark.parametrize("count", [2, 4 * (os.cpu_count() or 1) + 1])
def test_any_number_of_threads_gives_the_same(
    count: int, layer: PackedLinear, rows: Tensor, expected: Tensor
) -> None:
    set_num_threads(count)
    assert torch.equal(layer(rows), expected)
    for num in (1, 7, 60):
        torch.testing.assert_close(layer(rows[:num]), expected[:num])
    assert until(lambda: _cpu.num_asleep() == count - 1)


def test_the_number_may_change_between_calls(
    layer: PackedLinear, rows: Tensor, expected: Tensor
) -> None:
    for count in (3, 1, 2, 7, 2):
        set_num_threads(count)
        assert num_threads() == count
        assert torch.equal(layer(rows), expected)
        if count > 1:
            assert until(lambda count=count: _cpu.num_asleep() == count - 1)  # type: ignore[misc]
    set_num_threads(0)
    assert num_threads() == 1


def test_many_callers_at_once(layer: PackedLinear, rows: Tensor, expected: Tensor) -> None:
    """Also while the number of threads changes."""

    def call(i: int) -> bool:
        if i % 4 == 0:
            set_num_threads(2 + i // 4 % 3)
        return torch.equal(layer(rows), expected)

    set_num_threads(3)
    with ThreadPoolExecutor(6) as callers:
        assert all(callers.map(call, range(48)))


def test_a_call_while_another_runs(layer: PackedLinear, rows: Tensor, expected: Tensor) -> None:
    set_num_threads(3)
    few = layer(rows[:1])
    many = rows.repeat(24, 1)
    during = 0
    with ThreadPoolExecutor(1) as other:
        for _ in range(20):
            running = other.submit(layer, many)
            while not running.done():
                assert torch.equal(layer(rows[:1]), few)
                during += not running.done()
            assert torch.equal(running.result()[-512:], expected)
            if during:
                break
    assert during


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_a_forked_child_has_threads_of_its_own(
    layer: PackedLinear, rows: Tensor, expected: Tensor
) -> None:
    set_num_threads(3)
    layer(rows)
    with ThreadPoolExecutor(1) as other:
        running = other.submit(layer, rows.repeat(24, 1))  # the lock is held when it is forked
        time.sleep(0.01)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # newer Pythons warn of threads
            child = os.fork()
        if child == 0:
            code = 1
            try:
                torch.set_num_threads(1)  # those of OpenMP, torch's own, don't survive a fork
                right = [torch.equal(layer(rows), expected) for _ in range(3)]
                code = 0 if all(right) and until(lambda: _cpu.num_asleep() == 2) else 2
            finally:
                os._exit(code)
        running.result()
    ended: list[int] = []

    def has_ended() -> bool:
        pid, status = os.waitpid(child, os.WNOHANG)
        ended.extend([os.waitstatus_to_exitcode(status)] * (pid == child))
        return bool(ended)

    if not until(has_ended):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == [0]
    assert torch.equal(layer(rows), expected)  # and the parent has its own still


def test_the_number_of_threads_is_pytorchs_and_ours() -> None:
    """Ranks on one machine share its cores: neither may go on with all of them."""
    before = torch.get_num_threads()
    try:
        ops.set_num_threads(3)
        assert (torch.get_num_threads(), num_threads()) == (3, 3)
    finally:
        ops.set_num_threads(before)
