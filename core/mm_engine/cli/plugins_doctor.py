"""`engine plugins doctor`: what is wrong with the installation, and the command that cures it."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mm_engine.cli import options
from mm_engine.cli.contained import fail
from mm_engine.errors import MMEngineError
from mm_engine.plugins.printable import printable, to_json


def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object.")] = False,
    timeout: Annotated[
        float,
        typer.Option(
            min=0.1,
            max=options.MAX_SECONDS,
            metavar="SECONDS",
            help="How long a plugin's import may take.",
        ),
    ] = 30.0,
) -> None:
    """Examine the installed plugins; each thing that is wrong is one line, with its cure.

    It looks for plugins that can't be imported, hooks that are misspelt, requirements that aren't
    met, two plugins for one architecture, entry points that point nowhere, and metadata that is
    damaged or behind its source. Each plugin is imported in a process of its own. Exit code 1 if
    something is wrong.

    [bold]engine plugins doctor[/bold]
    """
    from mm_engine.plugins.doctor import diagnose

    try:
        found = diagnose(timeout)
    except MMEngineError as error:
        fail(str(error), as_json=as_json)
    if as_json:
        listed = [dataclasses.asdict(finding) for finding in found.findings]
        report = {"ok": not listed, "plugins": found.plugins, "findings": listed}
        typer.echo(to_json(report))
        raise typer.Exit(1 if listed else 0)
    if not found.findings:
        plugins = ", ".join(found.plugins) or "no plugin is installed"
        typer.echo(f"All well: {printable(plugins)}.")
        return
    console = Console(highlight=False, soft_wrap=True)
    for finding in found.findings:
        console.print(
            f"[red]✗[/red] [bold]{_safe(finding.label)}[/bold]: {_safe(finding.problem)}. "
            f"Run: [green]{_safe(finding.cure)}[/green]"
        )
    raise typer.Exit(1)


def _safe(text: str) -> str:
    return escape(printable(text))
