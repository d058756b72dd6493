"""Many measured values as a few figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PERCENTILES = "50,90,99"
#: The metrics of a load by their names in flags, as they are in a record; all in seconds.
METRICS = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2el": "e2e_latency"}


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of one metric, in the unit of its values."""

    count: int
    mean: float
    std: float  # of the values themselves, not an estimate for a larger whole
    min: float
    max: float
    percentiles: dict[float, float]  # 99.0 -> the value that 99% don't exceed

    def to_json(self) -> dict[str, Any]:
        """All figures by name; a percentile's is `p99`."""
        figures = {name: getattr(self, name) for name in ("count", "mean", "std", "min", "max")}
        return {**figures, **{f"p{p:g}": value for p, value in self.percentiles.items()}}


def summarize(values: Sequence[float], percentiles: Sequence[float]) -> Summary | None:
    """The figures of `values`, or None if there are none.

    Percentiles between two values are interpolated linearly, as numpy does by default.
    """
    if not values:
        return None
    import numpy as np

    array = np.asarray(values, dtype=np.float64)
    return Summary(
        count=len(array),
        mean=float(array.mean()),
        std=float(array.std()),
        min=float(array.min()),
        max=float(array.max()),
        percentiles={p: float(np.percentile(array, p)) for p in percentiles},
    )
