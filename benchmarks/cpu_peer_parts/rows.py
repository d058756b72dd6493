"""One line of the comparison, and measuring it by turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cpu_peer_parts.client import PeerError

OURS = "mm-engine"
PAUSE = 0.2  # seconds: what the machine does after an answer may take that long


@dataclass(slots=True)
class Row:
    """One figure of all engines, in `unit`."""

    key: str
    name: str
    unit: str
    higher: bool  # which way is better
    floor: float | None = None  # the best that it could be
    targets: Mapping[str, float] = field(default_factory=dict)
    at_most: float | None = None  # what this engine's figure should not be above
    rounds: dict[str, list[float]] = field(default_factory=dict)  # by engine
    missing: dict[str, str] = field(default_factory=dict)  # engine to reason
    details: dict[str, Any] = field(default_factory=dict)

    def median(self, engine: str) -> float | None:
        """Of an engine's rounds; None if it has none."""
        taken = self.rounds.get(engine)
        return statistics.median(taken) if taken else None

    def ratio(self, other: str) -> float | None:
        """How many times better this engine is than another one, or its share of the floor."""
        ours = self.median(OURS)
        theirs = self.floor if other == "floor" else self.median(other)
        if not ours or not theirs:
            return None
        return ours / theirs if self.higher else theirs / ours

    def verdicts(self) -> dict[str, bool | None]:
        """Whether each target is met; None where there is nothing to hold it against."""
        found: dict[str, bool | None] = {}
        for other, least in self.targets.items():
            ratio = self.ratio(other)
            found[other] = None if ratio is None else ratio >= least
        if self.at_most is not None:
            ours = self.median(OURS)
            found["at most"] = None if ours is None else ours <= self.at_most
        return found

    def to_json(self) -> dict[str, Any]:
        """All of it, with medians and ratios."""
        others = ["floor", *(name for name in self.rounds if name != OURS)]
        return {
            "key": self.key,
            "name": self.name,
            "unit": self.unit,
            "higher_is_better": self.higher,
            "floor": self.floor,
            "medians": {name: self.median(name) for name in self.rounds if self.rounds[name]},
            "ratios": {name: ratio for name in others if (ratio := self.ratio(name)) is not None},
            "targets": dict(self.targets),
            "at_most": self.at_most,
            "met": self.verdicts(),
            "rounds": self.rounds,
            "missing": self.missing,
            "details": self.details,
        }


def turns(
    row: Row,
    engines: Mapping[str, Callable[[int], float]],
    *,
    rounds: int,
    deadline: float,
    say: Callable[[str], None],
    warm_up: bool = True,
) -> None:
    """Measure a row: in each round every engine once, and another one first each time.

    The first round warms up and isn't kept, if `warm_up`. After `deadline` (`time.monotonic()`) no
    further round begins, but one is always kept. An engine that fails is left out from then on,
    with its reason, and without the figures that it had.
    """
    for round_ in range(rounds + warm_up):
        if round_ > warm_up and time.monotonic() > deadline:
            break
        kept = round_ >= warm_up
        for name in rotated(list(engines), round_):
            if name in row.missing:
                continue
            label = f"round {round_ + 1 - warm_up}" if kept else "warm-up"
            if warm_up:
                time.sleep(PAUSE)
            try:
                figure = engines[name](round_)
            except PeerError as error:
                row.missing[name] = str(error)
                row.rounds.pop(name, None)
                say(f"{row.name} · {label} · {name}: {error}")
                continue
            say(f"{row.name} · {label} · {name}: {figure:.4g} {row.unit}")
            if kept:
                row.rounds.setdefault(name, []).append(figure)


def rotated(names: Sequence[str], by: int) -> list[str]:
    """The same names, beginning with another one."""
    by %= max(1, len(names))
    return [*names[by:], *names[:by]]


def first_seconds(answer: Mapping[str, Any], count: int) -> float:
    """When the last of `count` sequences had its first token."""
    return float(answer["events"][_all_began(answer["events"], count)][0])


def last_seconds(answer: Mapping[str, Any]) -> float:
    """When all was answered."""
    return float(answer["events"][-1][0])


def decode_rate(answer: Mapping[str, Any], count: int) -> float:
    """Tokens per second of all sequences, from when the last began until the first ended.

    Raises:
        PeerError: there was no such time: sequences ended before the last one began.
    """
    events = answer["events"]
    begin = _all_began(events, count)
    end = next((i for i, event in enumerate(events) if event[3]), len(events) - 1)
    if end <= begin:
        raise PeerError("the sequences didn't decode together: the first ended too early")
    tokens = sum(event[2] for event in events[begin + 1 : end + 1])
    return float(tokens / (events[end][0] - events[begin][0]))


def _all_began(events: Sequence[Sequence[Any]], count: int) -> int:
    """Index of the step in which the last sequence got its first token."""
    began = 0
    for i, event in enumerate(events):
        began += event[1]
        if began >= count:
            return i
    raise PeerError(f"{began} of {count} sequences began")


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the straight line nearest to some points, by least squares."""
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    return sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / sum(
        (a - x) ** 2 for a in xs
    )
