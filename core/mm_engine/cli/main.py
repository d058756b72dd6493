"""The command `engine`. Heavy imports happen inside the commands that need them."""

from __future__ import annotations

import logging
import os
import sys
import threading
from importlib import metadata
from typing import Annotated, NoReturn

import typer

from mm_engine.cli.bench.commands import app as bench_app
from mm_engine.cli.chat.command import chat
from mm_engine.cli.generate import generate
from mm_engine.cli.plugins import app as plugins_app
from mm_engine.cli.serve import serve
from mm_engine.errors import MMEngineError
from mm_engine.log import format_in_use
from mm_engine.plugins.discovery import installed
from mm_engine.plugins.printable import printable
from mm_engine.plugins.tolerance import pass_over_damage

app = typer.Typer(
    name="engine",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(chat)
app.command()(generate)
app.add_typer(bench_app, name="bench")
app.add_typer(plugins_app, name="plugins")


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    typer.echo(f"mm-engine {metadata.version('mm-engine')}")
    for line in dict.fromkeys(f"{p.distribution} {p.version}" for p in installed()):
        typer.echo(line)
    raise typer.Exit


@app.callback()
def engine(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,
            help="Print the versions of mm-engine and of each installed plugin.",
        ),
    ] = False,
) -> None:
    """Serve vision-language models; each model is a pip package."""


def main() -> None:
    """Run the command line; an error is one line on stderr and exit code 1."""
    pass_over_damage()
    try:
        app()
    except MMEngineError as error:
        _tell(printable(" ".join(str(error).split())))
        _exit(1)
    except KeyboardInterrupt:
        _exit(130)
    except SystemExit as error:
        if not isinstance(error.code, int | None):
            raise
        _exit(error.code or 0)


def _tell(error: str) -> None:
    """Say on stderr why the program ends: as a line of the log where that is JSON."""
    if format_in_use() == "json":
        logging.getLogger("mm_engine.cli").error("%s", error)
    else:
        typer.echo(f"error: {error}", err=True)


def _exit(code: int) -> NoReturn:
    """End the process; at once if a plugin's call still runs: an orderly end would crash in it."""
    if any(thread.name.startswith("hook: ") for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)
