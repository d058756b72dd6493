"""`--plugin ./my_model.py`: a plugin in one file, for development."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mm_engine.errors import StartupError
from mm_engine.plugins import importing
from mm_engine.plugins.discovery import find, load

ARCH = "TestForConditionalGeneration"
HOOKS = """
from mm_engine.plugins import hookimpl
from torch import nn
@hookimpl
def model_class(ctx): return nn.Identity
@hookimpl
def max_tokens(ctx, modality): return 4
"""


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., str]:
    def write(source: str, name: str = "mm_test_file.py") -> str:
        (tmp_path / name).write_text(source)
        return str(tmp_path / name)

    return write


def test_import_that_takes_too_long_is_given_up_on(
    write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importing, "MIN_SECONDS", 0.2)
    record = find(ARCH, [write("import time; time.sleep(3)")])
    what = r"the plugin file can't be imported: mm_test_file.py takes longer than 0.2 s. Repair it"
    with pytest.raises(StartupError, match=what):
        load(record, timeout=0.1)


def test_file_wins_over_what_is_installed(
    install: Callable[..., Path], write: Callable[..., str]
) -> None:
    install("mm-test", "1.0", {ARCH: "mm_test_one"}, {"mm_test_one.py": "raise SystemExit"})
    plugin = load(find(ARCH, [write(HOOKS)]))
    assert plugin.label.startswith("mm_test_file.py sha256:")
    assert plugin.hooks == ("model_class", "max_tokens")


def test_file_without_a_declaration_serves_any_architecture(write: Callable[..., str]) -> None:
    assert find("Whatever", [write("")]).architecture == "Whatever"


@pytest.mark.parametrize("declaration", [f"= ['Else', '{ARCH}']", f": list[str] = ['{ARCH}']"])
def test_file_serves_what_it_declares_and_nothing_else(
    write: Callable[..., str], declaration: str
) -> None:
    path = write(f"ARCHITECTURES {declaration}\nraise SystemExit")
    assert find(ARCH, [path]).path == path
    with pytest.raises(StartupError, match=rf"mm_test_file.py serves .*{ARCH} only"):
        find("Whatever", [path])


def test_second_file_is_asked_when_the_first_serves_another(write: Callable[..., str]) -> None:
    first = write("ARCHITECTURES = ['Else']")
    second = write(f"ARCHITECTURES = ['{ARCH}']", "mm_test_second.py")
    assert find(ARCH, [first, second]).distribution == "mm_test_second.py"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("ARCHITECTURES = 'One'", "isn't a written-out list"),
        ("ARCHITECTURES = [name()]", "isn't a written-out list"),
        ("ARCHITECTURES: list[str]", "isn't a written-out list"),
        ("def (", "isn't Python"),
        ("\0", "isn't Python"),
    ],
)
def test_unreadable_declaration_is_refused(
    write: Callable[..., str], source: str, message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        find(ARCH, [write(source)])


def test_missing_file_is_one_clear_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match=r"can't be read: .*gone\.py \(No such file"):
        find(ARCH, [str(tmp_path / "gone.py")])


def test_file_that_changed_since_it_was_found_is_refused(write: Callable[..., str]) -> None:
    record = find(ARCH, [write(HOOKS)])
    write(HOOKS + "\n")
    with pytest.raises(StartupError, match="changed since it was found"):
        load(record)


def test_file_that_raises_is_one_line_and_leaves_no_module(write: Callable[..., str]) -> None:
    record = find(ARCH, [write("raise SystemExit('bye')")])
    with pytest.raises(StartupError, match=r"mm_test_file\.py raised SystemExit: bye\."):
        load(record)
    assert record.module not in sys.modules


def test_blame_points_into_the_file(write: Callable[..., str]) -> None:
    plugin = load(find(ARCH, [write(HOOKS)]))
    assert "(mm_test_file.py:6)" in str(plugin.blame("max_tokens", "expected 1, got 2"))
