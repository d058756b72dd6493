"""Write docs/reference from what the code says: the hooks and the CLI's help.

`make docs` runs it; a test fails where the files are behind the code.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from pathlib import Path

import typer
from typer.cli import get_docs_for_click

from mm_engine.cli.main import app
from mm_engine.plugins import hookspecs
from mm_engine.plugins.registration import REQUIRED, hook_names

REFERENCE = Path(__file__).parent / "reference"
MARK = "<!-- Written by docs/generate.py from {source}; edit that and run `make docs`. -->"


def hooks() -> str:
    """The page about the hooks: each one's signature and docstring."""
    parts = ["# Hooks", MARK.format(source="core/mm_engine/plugins/hookspecs.py")]
    parts.append(inspect.cleandoc(hookspecs.__doc__ or ""))
    for name in hook_names():
        hook = getattr(hookspecs, name)
        required = " (required)" if name in REQUIRED else ""
        parts.append(f"## `{name}`{required}")
        parts.append(f"```python\n@hookimpl\n{signature(hook)}: ...\n```")
        parts.append(inspect.getdoc(hook) or "")
    return "\n\n".join(parts) + "\n"


def signature(function: Callable[..., object]) -> str:
    """The `def` line as it is written, without the decorator and the colon."""
    (node,) = ast.parse(inspect.getsource(function)).body
    assert isinstance(node, ast.FunctionDef) and node.returns is not None
    return f"def {node.name}({ast.unparse(node.args)}) -> {ast.unparse(node.returns)}"


def cli() -> str:
    """The page about the command line, as `engine --help` has it."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="engine")
    text = re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", text)  # rich's markup
    lines = [line.rstrip() for line in text.strip().splitlines()]
    lines[1:1] = ["", MARK.format(source="core/mm_engine/cli")]
    return "\n".join(lines) + "\n"


PAGES = {"hooks.md": hooks, "cli.md": cli}


def main() -> None:
    """Write every page."""
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
