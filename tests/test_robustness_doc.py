"""docs/robustness.md names every row, and tests that exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "robustness.md").read_text("utf-8")
NUM_ROWS = 37
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def rows(page: str) -> dict[int, str]:
    """The tests' cell of each row, by its number."""
    lines = re.findall(r"^\| (\d+) \| .+ \| (.+) \|$", page, re.MULTILINE)
    numbers = [int(number) for number, _ in lines]
    assert len(set(numbers)) == len(numbers), "a row stands there twice"
    return {int(number): cell for number, cell in lines}


@cache
def names_in(name: str) -> frozenset[str]:
    """The tests of a file, which isn't run."""
    path = ROOT / name
    if not path.is_file():
        return frozenset()
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in nodes if isinstance(node, kinds))


def missing(page: str) -> list[str]:
    """What the page names that isn't there."""
    return [f"{file}::{test}" for file, test in NAMED.findall(page) if test not in names_in(file)]


def test_every_row_is_there() -> None:
    assert sorted(rows(PAGE)) == list(range(1, NUM_ROWS + 1))


@pytest.mark.parametrize("number", range(1, NUM_ROWS + 1))
def test_a_row_names_its_tests_or_says_what_is_missing(number: int) -> None:
    cell = rows(PAGE)[number]
    assert NAMED.search(cell) or "◐" in cell
    if "◐" in cell:
        assert f"- **{number}**: " in PAGE, "what is missing is said below"


def test_every_test_that_is_named_exists() -> None:
    assert missing(PAGE) == []
    assert len(NAMED.findall(PAGE)) > 2 * NUM_ROWS


@pytest.mark.parametrize(
    "name",
    [
        "`tests/test_robustness_doc.py::test_that_is_not_there`",
        "`tests/test_no_such_file.py::test_every_row_is_there`",
    ],
)
def test_the_check_finds_what_is_not_there(name: str) -> None:
    assert missing(f"| 1 | x | y | {name} |") == [name.strip("`")]


def test_nothing_that_looks_like_a_test_is_passed_over() -> None:
    assert PAGE.count("::") == len(NAMED.findall(PAGE))
