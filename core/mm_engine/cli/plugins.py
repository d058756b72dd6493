"""`engine plugins`: what is installed, and whether it would work."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from mm_engine.errors import MMEngineError
from mm_engine.plugins.discovery import PluginRecord, installed, load

app = typer.Typer(help="The installed model plugins.", no_args_is_help=True)


@app.callback()
def plugins() -> None:
    """The installed model plugins."""  # with a callback, the one command keeps its name


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
    summaries = summarize(installed())
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(summary) for summary in summaries], indent=2))
        return
    if not summaries:
        typer.echo("No plugins are installed. Install the package that brings your model.")
        return
    table = Table("distribution", "version", "architectures", "hooks", "state", box=None)
    for row in summaries:
        table.add_row(
            row.distribution,
            row.version,
            "\n".join(row.architectures),
            "\n".join(row.hooks),
            row.state,
        )
    Console().print(table)


def summarize(records: list[PluginRecord]) -> list[PluginSummary]:
    """Load each plugin, so that what is broken shows, and sum up what was found."""
    by_module: dict[tuple[str, str, str], list[PluginRecord]] = defaultdict(list)
    for record in records:
        by_module[record.distribution, record.version, record.module].append(record)
    summaries = []
    for (distribution, version, _), group in sorted(by_module.items()):
        hooks: tuple[str, ...] = ()
        try:
            hooks = load(group[0]).hooks
            state = _conflicts(group, records) or "ok"
        except MMEngineError as error:
            state = f"broken: {error}"
        architectures = [record.architecture for record in group]
        summaries.append(PluginSummary(distribution, version, architectures, list(hooks), state))
    return summaries


def _conflicts(group: list[PluginRecord], records: list[PluginRecord]) -> str:
    return "; ".join(
        f"conflict: {record.architecture} is also served by {other.label}"
        for record in group
        for other in records
        if other.architecture == record.architecture and other.distribution != record.distribution
    )
