"""How the flags of `engine bench` become groups, and the group that says where figures go.

The other groups are in `engine_flags.py` and `load_flags.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from mm_engine.cli.bench.summary import METRICS
from mm_engine.errors import StartupError

RESULT_PANEL = "Results"
PLOT_SUFFIXES = (".png", ".svg", ".pdf")


class FlagMisuse(Exception):
    """Flags that contradict each other or can't be read; one line on stderr, exit code 2."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ResultFlags:
    """Where the figures go besides the table."""

    json: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write all figures, with machine, versions, commit and arguments, to this file.",
            show_default=False,
            rich_help_panel=RESULT_PANEL,
        ),
    ] = None
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the distributions to this file: .png, .svg or .pdf. "
            "Needs mm-engine\\[bench].",
            show_default=False,
            rich_help_panel=RESULT_PANEL,
        ),
    ] = None

    def check(self) -> None:
        """See that both can be written, before anything is measured.

        Raises:
            FlagMisuse: the plot's suffix is not known.
            StartupError: a folder isn't there, or matplotlib is missing.
        """
        for flag, path in (("--json", self.json), ("--plot", self.plot)):
            if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
                raise StartupError(f"{flag} can't be written: {path}. Name a file in a folder.")
        if self.plot is None:
            return
        if self.plot.suffix not in PLOT_SUFFIXES:
            raise FlagMisuse(
                f"--plot has no suffix that is known: {self.plot}. "
                f"Write one of {', '.join(PLOT_SUFFIXES)}."
            )
        from importlib.util import find_spec

        if find_spec("matplotlib") is None:
            raise StartupError(
                "matplotlib is missing: --plot draws with it. Run: pip install 'mm-engine[bench]'"
            )


def read_percentiles(text: str) -> tuple[float, ...]:
    """Percentiles of a flag such as `50,90,99.9`, in rising order.

    Raises:
        FlagMisuse: one is no number from 0 to 100.
    """
    try:
        percentiles = sorted({float(part) for part in text.split(",")})
    except ValueError:
        percentiles = []
    if not percentiles or not all(0 <= percentile <= 100 for percentile in percentiles):
        raise FlagMisuse(f"--metric-percentiles can't be read: {text}. Write 50,90,99.")
    return tuple(percentiles)


def read_metrics(text: str) -> tuple[str, ...]:
    """Metrics of a flag such as `ttft,itl`, in the order of `METRICS`.

    Raises:
        FlagMisuse: one is not known.
    """
    given = {part.strip() for part in text.split(",")}
    if not given <= METRICS.keys():
        known = ",".join(METRICS)
        raise FlagMisuse(f"--percentile-metrics can't be read: {text}. Write some of {known}.")
    return tuple(name for name in METRICS if name in given)


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Let Typer see a flag for each field of the dataclasses that `command` takes.

    One line in a group is then a flag of every command that takes the group.
    """
    hints = typing.get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {
        name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)
    }
    flags: dict[str, tuple[Any, Any]] = {}  # annotation and default, by name
    for parameter in inspect.signature(command).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            flags[parameter.name] = hints[parameter.name], parameter.default
        else:
            kinds = typing.get_type_hints(group, include_extras=True)
            for field in dataclasses.fields(group):
                flags[field.name] = kinds[field.name], field.default

    @functools.wraps(command)
    def run(**values: Any) -> None:
        for name, group in groups.items():
            values[name] = group(**{f.name: values.pop(f.name) for f in dataclasses.fields(group)})
        try:
            command(**values)
        except FlagMisuse as misuse:
            typer.echo(f"error: {misuse}", err=True)
            raise typer.Exit(2) from None

    kind_of = inspect.Parameter.KEYWORD_ONLY
    seen: Any = run  # what Typer looks at
    del seen.__wrapped__
    seen.__annotations__ = {name: kind for name, (kind, _) in flags.items()}
    seen.__signature__ = inspect.Signature(
        [
            inspect.Parameter(name, kind_of, default=default, annotation=kind)
            for name, (kind, default) in flags.items()
        ]
    )
    return run
