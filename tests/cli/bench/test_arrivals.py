"""When requests are sent, in simulated time: no test here waits."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import numpy as np
import pytest

from mm_engine.cli.bench.arrivals import arrival_times, drive


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock jumps to the next thing to do."""

    def __init__(self) -> None:
        self.now = 0.0
        loop = self

        class Selector(selectors.DefaultSelector):  # type: ignore[valid-type,misc]
            def select(self, timeout: float | None = None) -> Any:
                loop.now += timeout or 0.0
                return super().select(0)

        super().__init__(Selector())

    def time(self) -> float:
        return self.now


def simulate(work: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=SimulatedLoop) as runner:
        runner.run(work)


class Server:
    """Takes some seconds for each request, and notes when it was asked."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds = seconds
        self.begun: dict[int, float] = {}
        self.most = self.in_flight = 0

    async def send(self, index: int) -> None:
        self.begun[index] = asyncio.get_running_loop().time()
        self.in_flight += 1
        self.most = max(self.most, self.in_flight)
        await asyncio.sleep(self.seconds(index))
        self.in_flight -= 1


def times(rate: float, burstiness: float = 1.0, count: int = 20_000) -> list[float]:
    return arrival_times(count, rate, burstiness, np.random.default_rng(0))


@pytest.mark.parametrize("burstiness", [0.25, 1.0, 4.0])
def test_arrivals_have_the_rate_and_the_burstiness_asked_for(burstiness: float) -> None:
    gaps = np.diff(times(5.0, burstiness))
    assert gaps.min() >= 0
    assert gaps.mean() == pytest.approx(1 / 5, rel=0.05)
    # of a gamma distribution with shape k the standard deviation is the mean over sqrt(k)
    assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.05)


def test_poisson_counts_in_equal_times_vary_as_much_as_their_mean() -> None:
    counts = np.histogram(times(10.0), bins=np.arange(0, 1900))[0]
    assert counts.mean() == pytest.approx(10, rel=0.05)
    assert counts.var() == pytest.approx(counts.mean(), rel=0.1)


def test_an_infinite_rate_is_all_at_once_and_the_first_never_waits() -> None:
    assert times(float("inf"), count=3) == [0.0, 0.0, 0.0]
    assert times(1.0)[0] == 0.0


def test_an_open_load_is_sent_on_time_however_slow_the_server_is() -> None:
    arrivals = times(5.0, count=200)
    server = Server(lambda index: 1000.0)
    simulate(drive(arrivals, server.send))
    assert [server.begun[index] for index in range(200)] == pytest.approx(arrivals)
    assert server.most == 200


def test_a_closed_load_keeps_so_many_in_flight_and_no_more() -> None:
    server = Server(lambda index: 1.0 + index % 3)
    simulate(drive([0.0] * 50, server.send, max_concurrency=7))
    assert server.most == 7
    begun = list(server.begun)
    assert begun == sorted(begun)  # in their order
    busy = sum(1.0 + index % 3 for index in range(50))
    assert max(server.begun.values()) <= busy / 7  # a free place was taken at once


def test_a_rate_and_a_limit_apply_together() -> None:
    arrivals = times(2.0, count=100)
    server = Server(lambda index: 3.0)
    simulate(drive(arrivals, server.send, max_concurrency=2))
    assert server.most == 2
    assert all(server.begun[i] >= arrival - 1e-9 for i, arrival in enumerate(arrivals))


def test_ending_early_ends_what_is_in_flight() -> None:
    ended: list[int] = []

    async def send(index: int) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            ended.append(index)

    async def interrupted(work: Awaitable[None]) -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(10):
                await work

    simulate(interrupted(drive([0.0] * 5, send)))
    assert sorted(ended) == list(range(5))
