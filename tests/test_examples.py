"""The examples, installed as their readers would, and checked by their own tests."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from installing import engine

PROJECTS = Path(__file__).parents[1].glob("examples/*/pyproject.toml")
EXAMPLES = sorted(file.parent for file in PROJECTS)
MAX_LINES = 200  # what a plugin may take, blank lines and docstrings included


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda folder: folder.name)
def installed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """An example, copied away from the checkout, and the folder that it is installed in."""
    source = tmp_path_factory.mktemp("source") / request.param.name
    shutil.copytree(request.param, source, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("site")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    done = subprocess.run(
        [*pip, "--no-index", "--target", str(target), str(source)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return source, target


@pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)
def test_an_example_is_short(folder: Path) -> None:
    files = (folder / folder.name).rglob("*.py")
    assert sum(len(file.read_text("utf-8").splitlines()) for file in files) < MAX_LINES


def test_an_example_passes_the_whole_check(installed: tuple[Path, Path]) -> None:
    source, target = installed
    done = engine("plugins", "check", source.name.replace("_", "-"), "--json", path=[target])
    report = json.loads(done.stdout)
    assert done.returncode == 0 and report["passed"], done.stdout
    assert {result["status"] for result in report["results"]} == {"passed"}


def test_an_examples_own_tests_pass_away_from_the_checkout(installed: tuple[Path, Path]) -> None:
    source, target = installed
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=source,
        env={**os.environ, "PYTHONPATH": str(target)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert "passed" in last and "skipped" not in last
