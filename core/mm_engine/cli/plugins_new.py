"""`engine plugins new`: a plugin's package that works before anything is filled in."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

STEPS = (
    ("cd {folder}", ""),
    ('pip install -e ".[dev]"', ""),
    ("engine plugins check {distribution}", "passes as it is"),
    ("engine serve {package}/tiny", "answers, with random weights"),
)
THEN = """
Then make it yours: [bold]{package}/counts.py[/bold] (how many tokens an image takes), \
[bold]{package}/model.py[/bold] (embed_images), and the hooks in [bold]{package}/plugin.py[/bold], \
which say what they are for."""


def new(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="The package as pip knows it: mm-foo.", show_default=False
        ),
    ],
    path: Annotated[
        Path,
        typer.Option("--path", metavar="DIR", help="The folder that NAME/ is made in."),
    ] = Path("."),
    architecture: Annotated[
        str | None,
        typer.Option(
            "--architecture",
            metavar="CLASS",
            help="What config.json of your checkpoints says under architectures. "
            "Default: FooForConditionalGeneration for mm-foo.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Write a new plugin's package: hooks, model, tests, a tiny checkpoint, CI.

    It passes `engine plugins check` as it is, and can be served; then you make it yours.

    [bold]engine plugins new mm-foo --architecture FooForConditionalGeneration[/bold]
    """
    from mm_engine.testing.scaffold import names_of, write_plugin

    names = names_of(name, architecture)
    folder = path.expanduser() / name
    console = Console(stderr=True)
    with console.status("…") as status:
        files = write_plugin(names, folder, on_step=lambda step: status.update(f"{step} …"))
    for file in files:
        size = f"[dim]{(folder / file).stat().st_size:>9,} bytes[/dim]"
        console.print(f"{size}  {escape(str(folder / file))}", highlight=False, soft_wrap=True)
    values = {
        "folder": shlex.quote(str(folder)),
        "distribution": names.distribution,
        "package": names.package,
    }
    out = Console(highlight=False, soft_wrap=True)
    out.print("\n[bold]Next[/bold]")
    commands = [(command.format(**values), remark) for command, remark in STEPS]
    width = max(len(command) for command, remark in commands if remark)
    for command, remark in commands:
        comment = f"{' ' * (width - len(command))}  [dim]# {remark}[/dim]" if remark else ""
        out.print(f"  {escape(command)}{comment}")
    out.print(THEN.format(**values))
