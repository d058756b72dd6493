"""What the sections share: the engines, the rows, and asking by turns."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cpu_peer_parts.fleet import Fleet
from cpu_peer_parts.rows import Row, decode_rate, turns
from cpu_peer_parts.sizes import TARGETS, Floors, Sizes


@dataclass(slots=True)
class Bench:
    """What the sections share."""

    fleet: Fleet
    floors: Floors
    rounds: int
    seconds: float  # of a section
    say: Callable[[str], None]
    rows: list[Row] = field(default_factory=list)  # of the section that runs
    known: dict[str, Row] = field(default_factory=dict)  # of all, by key
    seeds: Iterator[int] = field(default_factory=itertools.count)

    @property
    def sizes(self) -> Sizes:
        """What is asked."""
        return self.fleet.sizes

    def row(self, key: str, name: str, unit: str, *, higher: bool, **more: Any) -> Row:
        """A new row, with the targets of its key, without the engines that can't take part."""
        row = Row(key, name, unit, higher, targets=TARGETS.get(key, {}), **more)
        row.missing |= self.fleet.missing()
        self.rows.append(row)
        self.known[key] = row
        return row

    def turns(self, row: Row, engines: Mapping[str, Callable[[int], float]], share: float) -> None:
        """Measure a row within a share of the section's time."""
        turns(
            row,
            {name: engine for name, engine in engines.items() if name not in row.missing},
            rounds=self.rounds,
            deadline=time.monotonic() + share * self.seconds,
            say=self.say,
            warm_up=self.rounds > 1,
        )

    def each(self, figure: Callable[[str], float]) -> dict[str, Callable[[int], float]]:
        """One measurement of every engine."""
        return {name: lambda _, name=name: figure(name) for name in self.fleet.names()}

    def each_with_images(
        self, count: int, figure: Callable[[str, list[int]], float]
    ) -> dict[str, Callable[[int], float]]:
        """The same with seeds of pictures: in a round the same for all, and seen by none before."""
        first = next(self.seeds) * 100_000

        def measurement(name: str) -> Callable[[int], float]:
            return lambda round_: figure(name, [first + round_ * count + i for i in range(count)])

        return {name: measurement(name) for name in self.fleet.names()}


def decode_row(bench: Bench, key: str, name: str, count: int, bits: float | None = None) -> Row:
    """A row for the rate of `count` sequences that decode together, with its floor."""
    sizes = bench.sizes
    middle = sizes.prompt + sizes.num_decoded // 2
    floor = count / bench.floors.step_seconds([middle] * count, bits)
    return bench.row(key, name, "tokens/s", higher=True, floor=floor)


def rate_of(
    bench: Bench, row: Row, count: int, quantization: str | None = None
) -> Callable[[str], float]:
    """Measures an engine's decode, and notes which tokens it began with."""
    sizes = bench.sizes
    prompts = [sizes.text_ids[: sizes.prompt]] * count

    def rate(name: str) -> float:
        answer = bench.fleet.ask(name, prompts, sizes.num_decoded, quantization=quantization)
        row.details.setdefault("first_token", {})[name] = answer["first_tokens"][0]
        return decode_rate(answer, count)

    return rate
