"""What the benchmarks print: progress on stderr while they run, tables on stdout at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mm_engine.cli.bench.startup import PARTS, Startup
from mm_engine.cli.bench.summary import Summary
from mm_engine.cli.bench.workload import Shape
from mm_engine.plugins.printable import printable

MAX_CACHED_SHARE = 0.2  # of prompts that share nothing
METRIC_NAMES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "inter-token latency",
    "e2el": "end-to-end latency",
}
PART_NAMES = {
    "imports": "imports",
    "checkpoint": "checkpoint",
    "engine_process": "engine process",
    "weights": "weights",
    "profile": "profile",
    "ready": "ready",
}


def on_terminal() -> bool:
    """Whether somebody could look at a progress bar."""
    return sys.stderr.isatty()


class Bar:
    """A progress bar on stderr; `tick` moves it, `status` says what is being done."""

    def __init__(self, progress: Progress, description: str, total: int) -> None:
        self._progress = progress
        self._task = progress.add_task(description, total=total)

    def tick(self) -> None:
        """One more is done."""
        self._progress.advance(self._task)

    def status(self, text: str) -> None:
        """Say what is being done now."""
        self._progress.update(self._task, description=text)


@contextmanager
def progress_bar(description: str, total: int) -> Iterator[Bar]:
    """A bar for `total` things to do; shown on a terminal only, gone at the end."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not on_terminal(),
    ) as progress:
        yield Bar(progress, description, total)


def print_latency(
    title: str, batch_size: int, latency: Summary, figures: Mapping[str, Any]
) -> None:
    """Print the table of `engine bench latency`."""
    console = _console(title)
    rows = {
        "measured": f"{latency.count} batches of {batch_size} · {_tokens(figures)}",
        "output": f"{figures['output_tokens_per_second']:,.1f} tokens/s",
    }
    console.print(_facts(rows))
    console.print(_summaries({"latency of a batch": latency}))


def print_throughput(title: str, figures: Mapping[str, Any]) -> None:
    """Print the table of `engine bench throughput`."""
    console = _console(title)
    console.print(_facts(_load_rows(figures)))
    _print_failures(console, figures["failures"])


def print_load(
    title: str, figures: Mapping[str, Any], summaries: Mapping[str, Summary | None]
) -> None:
    """Print the tables of `engine bench serve`."""
    console = _console(title)
    rows = _load_rows(figures)
    rows["in flight"] = f"at most {figures['max_in_flight']}"
    console.print(_facts(rows))
    shown = {METRIC_NAMES[name]: summary for name, summary in summaries.items() if summary}
    if shown:
        console.print(_summaries(shown))
    _print_failures(console, figures["failures"])


def cache_remark(shape: Shape, figures: Mapping[str, Any]) -> str | None:
    """What to say of prompts that share nothing, yet were found in a cache; None if they weren't.

    A template's own words at the start are shared, but they are few.
    """
    share = figures["cached_prompt_tokens"] / max(1, figures["prompt_tokens"])
    if shape.prefix_len or shape.image_repeats or share < MAX_CACHED_SHARE:
        return None
    return (
        f"{share:.0%} of the prompts' tokens came from a cache, though no two prompts are alike: "
        "the server has seen them before. Give another --seed."
    )


def print_startup(title: str, starts: Sequence[Startup], figures: Mapping[str, Any]) -> None:
    """Print the table of `engine bench startup`."""
    console = _console(title)
    table = Table("seconds", box=None)
    for name in (*PARTS, "ready"):
        table.add_column(PART_NAMES[name], justify="right")
    for number, start in enumerate(starts, 1):
        values = [f"{getattr(start, name):.2f}" for name in (*PARTS, "ready")]
        table.add_row(f"start {number}", *values)
    means = [f"{figures['mean_seconds'][name]:.2f}" for name in (*PARTS, "ready")]
    table.add_row("mean", *means, style="bold")
    console.print(table)


def _console(title: str) -> Console:
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"[bold]{escape(title)}[/bold]")
    return console


def _load_rows(figures: Mapping[str, Any]) -> dict[str, str]:
    answered = max(1, figures["answered"])
    prompt, output = figures["prompt_tokens"], figures["output_tokens"]
    return {
        "requests": f"{figures['answered']:,} of {figures['requests']:,} answered in "
        f"{figures['seconds']:,.2f} s · {figures['requests_per_second']:,.2f} requests/s",
        "prompts": f"{prompt:,} tokens, {prompt / answered:,.1f} each · "
        f"{figures['cached_prompt_tokens']:,} from a cache",
        "answers": f"{output:,} tokens, {output / answered:,.1f} each",
        "throughput": f"{figures['output_tokens_per_second']:,.1f} output tokens/s · "
        f"{figures['total_tokens_per_second']:,.1f} tokens/s in all",
    }


def _tokens(figures: Mapping[str, Any]) -> str:
    prompt, output = figures["prompt_tokens_each"], figures["output_tokens_each"]
    return f"prompts of {prompt:,.1f} tokens, answers of {output:,.1f}"


def _facts(rows: Mapping[str, str]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column()
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _summaries(summaries: Mapping[str, Summary]) -> Table:
    """One line for each metric, in milliseconds."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("milliseconds", no_wrap=True)
    percentiles = next(iter(summaries.values())).percentiles
    for name in ("mean", "std", *(f"p{percentile:g}" for percentile in percentiles), "max"):
        table.add_column(name, justify="right")
    for name, summary in summaries.items():
        values = (summary.mean, summary.std, *summary.percentiles.values(), summary.max)
        table.add_row(name, *(milliseconds(value) for value in values))
    return table


def milliseconds(seconds: float) -> str:
    """A time for people: no more digits than mean something."""
    value = seconds * 1000
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _print_failures(console: Console, failures: Mapping[str, Mapping[str, Any]]) -> None:
    for kind, failure in failures.items():
        message = escape(printable(failure["first_message"]))
        console.print(f"[bold red]failed[/bold red] {failure['count']:,} × {kind}: {message}")
