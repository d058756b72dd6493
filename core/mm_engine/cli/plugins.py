"""`engine plugins`: what is installed, and whether it would work."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from mm_engine.cli.contained import fail
from mm_engine.cli.plugins_check import check
from mm_engine.cli.plugins_doctor import doctor
from mm_engine.cli.plugins_new import new
from mm_engine.cli.plugins_trace import trace
from mm_engine.errors import MMEngineError
from mm_engine.plugins.discovery import installed
from mm_engine.plugins.installation import installations
from mm_engine.plugins.printable import printable, to_json
from mm_engine.plugins.probe import probe
from mm_engine.plugins.record import PluginRecord

MAX_IMPORT_SECONDS = 10.0  # `list` waits no longer for a plugin; `doctor` does

app = typer.Typer(help="The installed model plugins.", no_args_is_help=True)
app.command("new")(new)
app.command("check")(check)
app.command("doctor")(doctor)
app.command("trace")(trace)


@app.callback()
def plugins() -> None:
    """The installed model plugins."""


@dataclasses.dataclass(frozen=True, slots=True)
class PluginSummary:
    """One row of `engine plugins list`: a distribution's module with hooks."""

    distribution: str
    version: str
    architectures: list[str]
    hooks: list[str]  # those that it implements; the others have defaults
    state: str  # "ok", or what keeps it from serving


@app.command("list")
def list_plugins(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list.")] = False,
) -> None:
    """List the installed plugins: what they serve, the hooks they implement, their state."""
    try:
        summaries = summarize(installed())
    except MMEngineError as error:
        fail(str(error), as_json=as_json)
    for each in installations():
        if each.damage:
            line = f"damaged: {each.label} ({each.damage[0]}). Run: engine plugins doctor"
            typer.echo(printable(line), err=True)
    if as_json:
        typer.echo(to_json([dataclasses.asdict(summary) for summary in summaries]))
        return
    if not summaries:
        typer.echo("No plugins are installed. Install the package that brings your model.")
        return
    table = Table(box=None)
    for name in ("distribution", "version", "architectures", "hooks", "state"):
        table.add_column(name, overflow="fold")
    for row in summaries:
        cells = (row.distribution, row.version, *map("\n".join, (row.architectures, row.hooks)))
        table.add_row(*(Text(printable(cell)) for cell in (*cells, row.state)))
    Console().print(table)


def summarize(records: list[PluginRecord]) -> list[PluginSummary]:
    """Import each plugin in a process of its own, so that what is broken shows and hurts nobody."""
    by_module: dict[tuple[str, str, str], list[PluginRecord]] = defaultdict(list)
    for record in records:
        by_module[record.distribution, record.version, record.module].append(record)
    groups = [group for _, group in sorted(by_module.items())]
    results = probe([group[0] for group in groups], MAX_IMPORT_SECONDS)
    summaries = []
    for group, result in zip(groups, results, strict=True):
        state = _conflicts(group, records) or "ok"
        if result.state != "ok":
            state = f"broken: {result.message}"
        architectures = [record.architecture for record in group]
        first = group[0]
        summaries.append(
            PluginSummary(
                first.distribution, first.version, architectures, list(result.hooks), state
            )
        )
    return summaries


def _conflicts(group: list[PluginRecord], records: list[PluginRecord]) -> str:
    return "; ".join(
        f"conflict: {record.architecture} is also served by {other.label}"
        for record in group
        for other in records
        if other.architecture == record.architecture and other.distribution != record.distribution
    )
