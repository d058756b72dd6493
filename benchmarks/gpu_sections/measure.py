"""How long something takes on the device, and the lines that come of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

MAX_CALLS = 20  # in a round: a stream takes about a thousand launches before its host must wait
SLOW = 0.01  # seconds: on a CPU such a call is measured once, the first time
MAX_HOLD = 0.5  # seconds
HIGHEST_CLOCK = 2e9  # cycles a second: no card's is much higher, and a lower one holds longer


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure, what it is held against, and how it does.

    `ratio` is `floor / measured` for times and `measured / floor` for rates, unless `ratio_of` says
    otherwise. The target is the least that `ratio` should be, or with `at_most` the most.
    """

    name: str
    measured: float
    unit: str
    floor: float | None = None  # in the same unit
    ratio: float | None = None
    ratio_of: str = "of the floor"
    target: float | None = None
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None if there is none, or nothing to hold it against."""
        if self.target is None or self.ratio is None:
            return None
        return self.ratio <= self.target if self.at_most else self.ratio >= self.target

    def to_json(self) -> dict[str, Any]:
        """All fields, and `met`."""
        return {**asdict(self), "met": self.met}


@dataclass(slots=True)
class Section:
    """What a section found out so far: it is kept where the section fails later on."""

    rows: list[Row] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)

    def against_time(
        self, name: str, seconds: float, floor: float | None, target: float | None = None
    ) -> None:
        """Add a time in ms and the least that it could be, both given in seconds."""
        ratio = None if floor is None else floor / seconds
        floor_ms = None if floor is None else floor * 1e3
        self.rows.append(Row(name, seconds * 1e3, "ms", floor_ms, ratio, target=target))

    def against_rate(
        self, name: str, flops: float, best: float | None, target: float | None = None
    ) -> None:
        """Add a matrix rate in TFLOP/s and the measured best, both given in FLOP/s."""
        ratio = None if best is None else flops / best
        best_t = None if best is None else best / 1e12
        row = Row(name, flops / 1e12, "TFLOP/s", best_t, ratio, "of the matrix rate", target)
        self.rows.append(row)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(fn: Callable[[], object], device: torch.device, *, num_rounds: int = 7) -> float:
    """Seconds that the device takes for one call of `fn`: the median of some rounds.

    On CUDA a round is several calls between two events. The device is held until all of them are
    queued, so that the time to launch them isn't measured, unless `fn` itself waits for the device.
    What fits the card's L2 cache is found there by all calls but the first.
    """
    start = time.perf_counter()
    fn()  # compiles, allocates
    if device.type != "cuda":
        seconds = [time.perf_counter() - start]
        while len(seconds) < 4 and seconds[-1] < SLOW:
            start = time.perf_counter()
            fn()
            seconds.append(time.perf_counter() - start)
        return statistics.median(seconds[1:] or seconds)
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    fn()
    launch = time.perf_counter() - start
    torch.cuda.synchronize(device)
    whole = time.perf_counter() - start
    num_calls = max(1, min(MAX_CALLS, int(0.005 / whole)))
    return statistics.median(
        queued(fn, device, num_calls, launch * num_calls)[0] for _ in range(num_rounds)
    )


def queued(
    fn: Callable[[], object], device: torch.device, num_calls: int, launch: float
) -> tuple[float, bool]:
    """Seconds of each of `num_calls` calls, queued behind a device that is held meanwhile.

    `launch` is about how many seconds the host takes to queue them. The bool says whether they were
    all queued before the first began: if not, the host's time is a part of what was measured.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    hold = min(MAX_HOLD, 0.001 + 3 * launch)
    torch.cuda._sleep(int(hold * HIGHEST_CLOCK))
    begin.record()
    for _ in range(num_calls):
        fn()
    end.record()
    was_ahead = not begin.query()
    torch.cuda.synchronize(device)
    return begin.elapsed_time(end) / 1e3 / num_calls, was_ahead
