"""The documentation is true: pages are as generated, examples compile, commands and names exist."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from mm_engine.cli.main import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    *sorted(DOCS.rglob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "deploy/README.md")),
]
#: Packages of the reader's own, in examples.
INVENTED = ("mm_foo",)
BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)\n(?P<code>.*?)^(?P=indent)```$", re.M | re.S
)


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def name_of(value: object) -> str:
    return value.relative_to(ROOT).as_posix() if isinstance(value, Path) else str(value)


@pytest.mark.parametrize("name", ["hooks.md", "models.md", "plugin-api.md", "cli.md", "metrics.md"])
def test_reference_page_is_as_generated(name: str) -> None:
    written = (DOCS / "reference" / name).read_text("utf-8")
    assert written == generator().PAGES[name](), f"{name} is behind the code: run `make docs`"


def test_every_page_of_the_reference_is_generated() -> None:
    written = {path.name for path in (DOCS / "reference").iterdir()}
    assert written == set(generator().PAGES)


def blocks(page: Path, language: str) -> Iterator[str]:
    """The code of a page's blocks of one language."""
    for found in BLOCK.finditer(page.read_text("utf-8")):
        if found["language"] == language:
            yield textwrap.dedent(found["code"])


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_examples_compile(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_that_examples_import_exist_and_are_public(page: Path) -> None:
    wrong = [
        f"{module}.{name}"
        for code in blocks(page, "python")
        for module, name in imports_of(ast.parse(code))
        if not is_there(module, name)
    ]
    assert wrong == []


def imports_of(tree: ast.Module) -> Iterator[tuple[str, str | None]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)


def is_there(module: str, name: str | None) -> bool:
    if module.partition(".")[0] in INVENTED:
        return True
    try:
        imported = importlib.import_module(module)
    except ImportError:
        return False
    if name is None:
        return True
    public = getattr(imported, "__all__", None) if module.startswith("mm_engine") else None
    return hasattr(imported, name) and (public is None or name in public)


@pytest.mark.parametrize(
    ("module", "name", "there"),
    [
        ("mm_engine.plugins", "hookimpl", True),
        ("mm_engine.plugins", "hook_impl", False),
        ("mm_engine.plugins", "defaults", False),  # it exists, but isn't public
        ("mm_engine.modules", "Projector", False),
        ("torch", "nn", True),
        ("mm_foo.counts", "num_image_tokens", True),
    ],
)
def test_the_rule_about_names_itself(module: str, name: str, there: bool) -> None:
    assert is_there(module, name) == there


def commands(page: Path) -> Iterator[str]:
    """The lines of console blocks that call `engine`, without their comments."""
    for block in blocks(page, "console"):
        shown = "$ " in block  # the others are what is printed
        for line in block.splitlines():
            line = line.strip()
            called = line.removeprefix("$ ") if line.startswith("$ ") or not shown else ""
            found = re.search(r"(?:^|&& |bin/)(engine .*)", called)
            if found is not None:
                yield found[1]


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != "cli.md"], ids=name_of)
def test_commands_that_are_shown_exist_with_their_options(page: Path) -> None:
    assert [(line, fault) for line in commands(page) if (fault := fault_of(line))] == []


def fault_of(line: str) -> str | None:
    """What keeps `engine` from taking a line, or None."""
    command: Any = typer.main.get_command(app)
    words = shlex.split(line, comments=True)[1:]
    if words == ["--version"]:
        return None
    while hasattr(command, "commands"):
        if not words or words[0] not in command.commands:
            return f"no such command: {words[:1]}"
        command = command.commands[words.pop(0)]
    context = command.context_class(command, info_name=command.name)
    try:
        _, rest, _ = command.make_parser(context).parse_args(words)
    except Exception as error:  # click raises one of its own for each kind of mistake
        return str(error)
    return f"arguments too many: {rest}" if rest else None


@pytest.mark.parametrize(
    ("line", "right"),
    [
        ("engine serve ./checkpoint --plugin ./my_model.py  # a comment", True),
        ("engine generate -i picture.png 'What is it?'", True),
        ("engine plugins check mm-foo --only counts", True),
        ("engine plugins check mm-foo --just counts", False),
        ("engine plugins cure", False),
        ("engine serve one two", False),
    ],
)
def test_the_rule_about_commands_itself(line: str, right: bool) -> None:
    assert (fault_of(line) is None) == right


def test_there_are_commands_and_examples_to_look_at() -> None:
    assert len(list(commands(DOCS / "tutorial.md"))) >= 7
    assert len(list(blocks(DOCS / "tutorial.md", "python"))) >= 5


def headings(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    text = BLOCK.sub("", page.read_text("utf-8"))
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    text = BLOCK.sub("", page.read_text("utf-8"))
    links = re.findall(r"\]\(([^)\s]+)\)|(?:href|src)=\"([^\"]+)\"", text)
    broken = []
    for link in (first or second for first, second in links):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in headings(target)):
            broken.append(link)
    assert broken == []


def test_every_page_can_be_reached_from_the_index() -> None:
    index = (DOCS / "README.md").read_text("utf-8")
    pages = [path for path in DOCS.rglob("*.md") if path.name != "README.md"]
    missing = [name_of(p) for p in pages if f"({p.relative_to(DOCS).as_posix()})" not in index]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_no_page_shows_a_path_of_somebodys_machine(page: Path) -> None:
    assert re.findall(r"/(?:home|root|Users|tmp|work)/\S*", page.read_text("utf-8")) == []
