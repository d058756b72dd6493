"""Write docs/reference from what the code says: hooks, public names, the CLI's help, metrics.

`make docs` runs it; a test fails where the files are behind the code.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import typer
from typer.cli import get_docs_for_click

import mm_engine.models
import mm_engine.plugins
import mm_engine.testing
from mm_engine.cli.main import app
from mm_engine.engine.status import EngineStats
from mm_engine.inputs.processed_items import ProcessedItems
from mm_engine.plugins import hookspecs
from mm_engine.plugins.record import PluginRecord
from mm_engine.plugins.registration import REQUIRED, hook_names
from mm_engine.server.metrics import Metrics
from mm_engine.testing.checker import MODULES
from mm_engine.testing.registry import CHECKS, FUNCTIONS

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
        parts.append(f"```python\n@hookimpl\n{signature(hook)}\n```")
        parts.append(prose(hook))
    return "\n\n".join(parts) + "\n"


def models() -> str:
    """The page about what plugins build models from."""
    parts = ["# What models are built from", MARK.format(source="core/mm_engine/models")]
    return "\n\n".join([*parts, *module_parts(mm_engine.models, "##")]) + "\n"


def plugin_api() -> str:
    """The page about the names that hooks use, and about the test kit."""
    parts = ["# What hooks and tests use"]
    parts.append(MARK.format(source="core/mm_engine/plugins and core/mm_engine/testing"))
    for module in (mm_engine.plugins, mm_engine.testing):
        parts += [f"## `{module.__name__}`", *module_parts(module, "###")]
    return "\n\n".join([*parts, "### The checks", checks()]) + "\n"


def module_parts(module: ModuleType, level: str) -> Iterator[str]:
    """A module's docstring, then each of its public names."""
    text = inspect.cleandoc(module.__doc__ or "")
    yield re.sub(r"(?m)^    .*(\n+    .*)*$", lambda code: fenced(code[0]), text)
    for name in module.__all__:
        yield f"{level} `{name}`"
        yield from described(getattr(module, name))


def described(value: Any) -> Iterator[str]:
    """A name's code and its docstring; of a class its fields and methods, too."""
    if isinstance(value, type):
        yield from described_class(value)
    elif inspect.isfunction(value):
        yield f"```python\n{signature(value)}\n```"
        yield prose(value)
    else:  # a marker, such as `hookimpl`
        yield NAMES_WITHOUT_SOURCE[type(value).__name__]


#: What is said of names that are neither class nor function, by their type.
NAMES_WITHOUT_SOURCE = {
    "HookimplMarker": "Marks a function of your module as an implementation of the hook of the "
    "same name: `@hookimpl`. pluggy's `specname` lets it have another name: "
    '`@hookimpl(specname="max_tokens")`.'
}


def described_class(cls: type) -> Iterator[str]:
    """A class: its fields with their comments, its docstring, its public methods."""
    source = textwrap.dedent(inspect.getsource(cls))
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    lines = source.splitlines()
    bases = f"({', '.join(ast.unparse(base) for base in node.bases)})" if node.bases else ""
    code = [f"class {cls.__name__}{bases}:", *fields(node, lines)]
    init = next((inner for inner in methods(node) if inner.name == "__init__"), None)
    if init is not None:
        code.append(textwrap.indent(header(init, lines), "    "))
    if len(code) == 1:
        code[0] += " ..."
    yield "```python\n" + "\n".join(code) + "\n```"
    yield prose(cls)
    for method in methods(node):
        if not method.name.startswith("_"):
            kinds = [ast.unparse(decorator) for decorator in method.decorator_list]
            text = ast.get_docstring(method) or ""
            if "property" in kinds:
                assert method.returns is not None
                yield f"`.{method.name}` (`{ast.unparse(method.returns)}`): {text}"
            else:
                yield f"```python\n{header(method, lines)}\n```"
                yield sections(text)


def fields(node: ast.ClassDef, lines: list[str]) -> Iterator[str]:
    """The lines of a class's annotated fields, with the comments over and beside them."""
    for inner in node.body:
        if isinstance(inner, ast.AnnAssign) and not ast.unparse(inner.target).startswith("_"):
            first = inner.lineno - 1
            while lines[first - 1].lstrip().startswith("#"):
                first -= 1
            assert inner.end_lineno is not None
            yield from lines[first : inner.end_lineno]


def methods(node: ast.ClassDef) -> list[ast.FunctionDef]:
    """The functions of a class, in their order."""
    return [inner for inner in node.body if isinstance(inner, ast.FunctionDef)]


def signature(function: Callable[..., object]) -> str:
    """The `def` line of a function as it is written, without the decorator."""
    source = textwrap.dedent(inspect.getsource(function))
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.FunctionDef)
    return header(node, source.splitlines())


def header(node: ast.FunctionDef, lines: list[str]) -> str:
    """The lines of a function before its body, with an ellipsis for that."""
    written = lines[node.lineno - 1 : node.body[0].lineno - 1]
    return textwrap.dedent("\n".join(written)) + " ..."


def prose(value: object) -> str:
    """A docstring as Markdown."""
    return sections(inspect.getdoc(value) or "")


def sections(text: str) -> str:
    """A docstring as Markdown: what it raises becomes a list."""
    head, mark, raised = inspect.cleandoc(text).partition("Raises:\n")
    if not mark:
        return head
    items = re.split(r"\n(?=\w+: )", textwrap.dedent(raised).strip())
    listed = [" ".join(line.strip() for line in item.splitlines()) for item in items]
    bullets = [re.sub(r"^(\w+): ", r"- `\1`: ", item) for item in listed]
    return head + "Raises:\n\n" + "\n".join(bullets)


def fenced(code: str) -> str:
    """Indented code as a block."""
    return f"```python\n{textwrap.dedent(code).strip()}\n```"


def checks() -> str:
    """A table of the test kit's checks."""
    for module in MODULES:
        importlib.import_module(f"mm_engine.testing.checks_{module}")
    rows = ["| check | what holds | needs |", "|---|---|---|"]
    for name, needs in CHECKS.items():
        said = (inspect.getdoc(FUNCTIONS[name]) or "").partition("\n\n")[0].replace("\n", " ")
        rows.append(f"| `{name}` | {said} | {', '.join(f'`{need}`' for need in needs)} |")
    return "\n".join(rows)


def cli() -> str:
    """The page about the command line, as `engine --help` has it."""
    command = typer.main.get_command(app)
    text = get_docs_for_click(obj=command, ctx=typer.Context(command), name="engine")
    text = re.sub(r"\[bold\](.*?)\[/bold\]", r"`\1`", text)  # rich's markup
    lines = [line.rstrip() for line in text.strip().splitlines()]
    lines[1:1] = ["", MARK.format(source="core/mm_engine/cli")]
    return "\n".join(lines) + "\n"


def metrics() -> str:
    """The page about what `/metrics` shows, but for prometheus_client's own of the process."""
    shown = Metrics(PluginRecord("mm-foo", "0.1.0", "Foo", "mm_foo.plugin"), ProcessedItems(0))
    shown.engine.stats = EngineStats(**{f.name: 1 for f in dataclasses.fields(EngineStats)})
    shown.requests.labels("/health", 200)  # those with labels show once they have counted
    shown.http_seconds.labels("/health")
    parts = ["# Metrics", MARK.format(source="core/mm_engine/server/metrics.py")]
    parts.append(
        "What `/metrics` shows; [See what a server does](../howto/observe.md) says what for. A "
        "histogram is three names: with `_bucket` (label `le`), `_count` and `_sum` behind its own."
    )
    rows = ["| metric | type | labels | meaning |", "|---|---|---|---|"]
    for family in shown.registry.collect():
        if family.name.startswith("process_"):
            continue  # not the same on every system
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = sorted({label for sample in family.samples for label in sample.labels} - {"le"})
        listed = ", ".join(f"`{label}`" for label in labels)
        rows.append(f"| `{name}` | {family.type} | {listed} | {family.documentation} |")
    return "\n\n".join([*parts, "\n".join(rows)]) + "\n"


PAGES = {
    "hooks.md": hooks,
    "models.md": models,
    "plugin-api.md": plugin_api,
    "cli.md": cli,
    "metrics.md": metrics,
}


def main() -> None:
    """Write every page."""
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
