"""`engine plugins check`: a plugin held to the contract, on a CPU."""

from __future__ import annotations

from typing import Annotated, TextIO

import typer

from mm_engine.cli.contained import Announce, Show, contained


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
    is well; 1: a check failed, or the plugin ended the process it ran in; 2: there is no such
    plugin or check.
    """
    contained(
        lambda announce: _checked(plugin, model, only or [], announce, as_json),
        plugin,
        as_json=as_json,
        refused=2,
    )


def _checked(
    plugin: str, model: str | None, only: list[str], announce: Announce, as_json: bool
) -> tuple[int, Show]:
    """Run the checks with a line about the one that runs."""
    from rich.console import Console

    from mm_engine.testing import check_plugin

    with Console(stderr=True).status("importing …") as status:

        def on_start(name: str) -> None:
            announce(f"during the check {name}")
            status.update(f"checking {name} …")

        report = check_plugin(plugin, model, only=only, on_start=on_start)

    def show(out: TextIO) -> None:
        if as_json:
            out.write(report.to_json() + "\n")
        else:
            report.render(Console(file=out, highlight=False))

    return 0 if report.passed else 1, show
