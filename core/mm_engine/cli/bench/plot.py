"""Pictures of a run. matplotlib comes with mm-engine[bench] and is only imported in here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_engine.cli.bench.report import PART_NAMES, milliseconds
from mm_engine.cli.bench.startup import PARTS, Startup
from mm_engine.errors import StartupError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from mm_engine.cli.bench.offline import LatencyRun, ThroughputRun
    from mm_engine.cli.bench.online import LoadRun

BLUE, ORANGE, GREY = "#3b6fb6", "#d9822b", "#8a8a8a"
COLOURS = ("#3b6fb6", "#5fa8d3", "#d9822b", "#4a9a5b", "#8e6bb0")
MAX_BINS = 40
DPI = 120


def plot_load(run: LoadRun, title: str, path: Path) -> None:
    """Draw the distributions of TTFT, ITL and E2E, and the requests in flight over time."""
    figure, axes = _figure(title, 2, 2, (10, 7))
    answered = run.answered
    values = {
        "time to first token": [r.ttft for r in answered if r.ttft is not None],
        "inter-token latency": [itl for r in answered for itl in r.itls],
        "end-to-end latency": [r.e2e for r in answered],
    }
    for axis, (name, seconds) in zip(axes, values.items(), strict=False):
        what = "gaps" if name.startswith("inter") else "requests"
        _distribution(axis, seconds, name, what)
    flight = run.in_flight()
    axis = axes[3]
    axis.step([s for s, _ in flight], [n for _, n in flight], where="post", color=BLUE)
    axis.fill_between(
        [s for s, _ in flight], [n for _, n in flight], step="post", alpha=0.2, color=BLUE
    )
    axis.set_ylim(bottom=0)
    failed = [r.end - run.begin for r in run.requests if r.failure is not None]
    if failed:
        axis.plot(failed, [0] * len(failed), "x", color="firebrick", label="failed")
        axis.legend(frameon=False)
    _label(axis, "requests in flight", "seconds", "requests")
    _save(figure, path)


def plot_latency(run: LatencyRun, title: str, path: Path) -> None:
    """Draw the distribution of the latency of a batch, and each batch in turn."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(title, 1, 2, (10, 3.8))
    in_turn = [second * 1000 for second in run.seconds]
    _distribution(axes[0], run.seconds, "latency of a batch", "batches")
    axes[1].plot(range(1, len(run.seconds) + 1), in_turn, "o-", color=BLUE, markersize=3)
    axes[1].set_ylim(bottom=0)
    axes[1].xaxis.set_major_locator(MaxNLocator(integer=True))
    _label(axes[1], "one batch after another", "batch", "milliseconds")
    _save(figure, path)


def plot_throughput(run: ThroughputRun, title: str, path: Path) -> None:
    """Draw the output tokens per second and the sequences that run, over time."""
    figure, axes = _figure(title, 1, 2, (10, 3.8))
    seconds = [0.0, *(second for second, _, _ in run.progress)]
    tokens = [0, *(count for _, count, _ in run.progress)]
    width = max(1, len(seconds) // MAX_BINS)  # samples that a rate is taken over
    ends = range(width, len(seconds), width)
    rates = [
        (tokens[end] - tokens[end - width]) / max(1e-9, seconds[end] - seconds[end - width])
        for end in ends
    ]
    axes[0].plot([seconds[end] for end in ends], rates, color=BLUE)
    axes[0].axhline(run.output_tokens / run.seconds, color=ORANGE, label="mean")
    axes[0].set_ylim(bottom=0)
    axes[0].legend(frameon=False)
    _label(axes[0], "output", "seconds", "tokens/s")
    axes[1].step(
        [second for second, _, _ in run.progress],
        [running for _, _, running in run.progress],
        where="post",
        color=BLUE,
    )
    axes[1].set_ylim(bottom=0)
    _label(axes[1], "sequences in a step", "seconds", "sequences")
    _save(figure, path)


def plot_startup(starts: Sequence[Startup], title: str, path: Path) -> None:
    """Draw each start as a bar of its parts."""
    figure, (axis,) = _figure(title, 1, 1, (10, 1.6 + 0.4 * len(starts)))
    names = [f"start {number}" for number in range(1, len(starts) + 1)]
    left = [0.0] * len(starts)
    for part, colour in zip(PARTS, COLOURS, strict=True):
        widths = [getattr(start, part) for start in starts]
        axis.barh(names, widths, left=left, color=colour, label=PART_NAMES[part])
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.invert_yaxis()
    axis.legend(frameon=False, ncols=len(PARTS), loc="lower left", bbox_to_anchor=(0, 1))
    _label(axis, "", "seconds", "")
    _save(figure, path)


def _figure(
    title: str, rows: int, columns: int, size: tuple[float, float]
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure  # without pyplot, which would look for a screen

    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(title, fontsize=10)
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def _distribution(axis: Axes, seconds: Sequence[float], name: str, what: str) -> None:
    """A histogram with the median and the 99th percentile marked."""
    _label(axis, name, "milliseconds", what)
    if not seconds:
        axis.text(0.5, 0.5, "none", ha="center", va="center", transform=axis.transAxes)
        return
    import numpy as np
    from matplotlib.ticker import MaxNLocator

    bins = min(MAX_BINS, max(5, len(seconds) // 3))
    axis.hist([second * 1000 for second in seconds], bins=bins, color=BLUE)
    axis.yaxis.set_major_locator(MaxNLocator(integer=True))
    for percentile, colour in ((50, ORANGE), (99, GREY)):
        value = float(np.percentile(seconds, percentile))
        label = f"p{percentile}: {milliseconds(value)} ms"
        axis.axvline(value * 1000, color=colour, linestyle="--", label=label)
    axis.legend(frameon=False)


def _label(axis: Axes, title: str, x: str, y: str) -> None:
    axis.set_title(title, fontsize=10)
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.spines[["top", "right"]].set_visible(False)


def _save(figure: Any, path: Path) -> None:
    try:
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise StartupError(
            f"--plot can't be written: {path} ({error.strerror}). Name another file."
        ) from None
