"""`engine plugins check`: a plugin held to the contract, on a CPU."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from mm_engine.errors import StartupError

if TYPE_CHECKING:
    from mm_engine.testing import CheckReport


def check(
    plugin: Annotated[
        str,
        typer.Argument(
            metavar="PLUGIN",
            help="A distribution (mm-foo), an architecture, or a file (./my_model.py).",
            show_default=False,
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            metavar="PATH",
            help="A checkpoint's folder, a Hub id, or a bundled demo's name. Default: what the "
            "plugin brings, its demo or a small config that gets random weights.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Run this check, and what it needs. Repeatable.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check a plugin: its hooks, its counts over all sizes of images, its model.

    Where transformers knows the model, every stage is compared with it.
    [bold]engine plugins check mm-foo[/bold] needs no GPU and fetches nothing. Exit code 0: all
    is well; 1: a check failed; 2: there is no such plugin or check.
    """
    from rich.console import Console

    try:
        report = _checked(plugin, model, only or [])
    except StartupError as error:
        typer.echo(f"error: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        # A check still computes in its thread; Python's orderly end would crash in it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)
    if as_json:
        typer.echo(report.to_json())
    else:
        report.render(Console(highlight=False))
    raise typer.Exit(0 if report.passed else 1)


def _checked(plugin: str, model: str | None, only: list[str]) -> CheckReport:
    """Run the checks with a line about the one that runs; stdout is kept for the report."""
    from rich.console import Console

    from mm_engine.testing import check_plugin

    console = Console(stderr=True)
    with contextlib.redirect_stdout(sys.stderr), console.status("importing …") as status:
        return check_plugin(
            plugin, model, only=only, on_start=lambda name: status.update(f"checking {name} …")
        )
