"""`engine plugins list`: what is installed, what it implements, and what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mm_engine.cli.plugins import app

Install = Callable[..., Path]
HOOKS = """
from mm_engine.plugins import hookimpl
from torch import nn
@hookimpl
def model_class(ctx): return nn.Identity
@hookimpl
def max_tokens(ctx, modality): return 4
"""


def listed(*options: str) -> str:
    done = CliRunner().invoke(app, ["list", *options], catch_exceptions=False)
    assert done.exit_code == 0
    return done.output


def listed_json() -> dict[str, Any]:
    return {row["distribution"]: row for row in json.loads(listed("--json"))}


def test_json_has_distribution_version_architectures_hooks_and_state(install: Install) -> None:
    architectures = {"One": "mm_test_one", "Two": "mm_test_one"}
    install("mm-test", "0.3", architectures, {"mm_test_one.py": HOOKS})
    assert listed_json()["mm-test"] == {
        "distribution": "mm-test",
        "version": "0.3",
        "architectures": ["One", "Two"],
        "hooks": ["model_class", "max_tokens"],
        "state": "ok",
    }


@pytest.mark.parametrize(
    ("source", "state"),
    [
        ("raise SystemExit(3)", "broken: the plugin mm-test 0.1.0 can't be imported"),
        (HOOKS.replace("max_tokens", "max_token"), "broken: mm-test 0.1.0 · max_token"),
    ],
)
def test_broken_plugin_is_listed_beside_the_others(
    install: Install, source: str, state: str
) -> None:
    install("mm-test", "0.1.0", {"One": "mm_test_one"}, {"mm_test_one.py": source})
    install("mm-test-good", "0.1.0", {"Two": "mm_test_two"}, {"mm_test_two.py": HOOKS})
    rows = listed_json()
    assert rows["mm-test"]["state"].startswith(state)
    assert rows["mm-test"]["hooks"] == []
    assert rows["mm-test-good"]["state"] == "ok"


def test_conflict_shows_in_the_state_of_both(install: Install) -> None:
    install("mm-test-a", "1", {"One": "mm_test_a"}, {"mm_test_a.py": HOOKS})
    install("mm-test-b", "2", {"One": "mm_test_b"}, {"mm_test_b.py": HOOKS})
    rows = listed_json()
    assert rows["mm-test-a"]["state"] == "conflict: One is also served by mm-test-b 2"
    assert rows["mm-test-b"]["state"] == "conflict: One is also served by mm-test-a 1"


def test_table_names_the_plugin_and_its_state(install: Install) -> None:
    install("mm-test", "0.3", {"One": "mm_test_one"}, {"mm_test_one.py": HOOKS})
    (row,) = [line for line in listed().splitlines() if "mm-test" in line]
    assert row.split() == ["mm-test", "0.3", "One", "model_class", "ok"]


def test_what_a_plugin_raised_is_shown_whole(install: Install) -> None:
    """A narrow table folds, and takes nothing for markup."""
    source = f"raise KeyError('[/INST] {'word ' * 40}last')"
    install("mm-test", "0.3", {"One": "mm_test_one"}, {"mm_test_one.py": source})
    page = listed()
    assert "[/INST]" in page
    assert page.count("word") == 40 and "last'" in page
    assert "…" not in page


def test_nothing_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [])
    assert listed("--json") == "[]\n"
    assert "No plugins are installed" in listed()
