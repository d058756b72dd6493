"""What is meant by a line with a slash, and what Tab makes of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from mm_engine.cli.chat.commands import COMMANDS, HELP, completions, parse_command, paths_in
from mm_engine.errors import RequestError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home and the current folder."""
    for name in ("a.png", "a b.png", "it's.png", ".hidden.png"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / "c.png").write_bytes(b"")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("argument", "names"),
    [
        ("a.png", ["a.png"]),
        ("a b.png", ["a b.png"]),
        ("'a b.png'", ["a b.png"]),
        ('"a b.png"', ["a b.png"]),
        ("a\\ b.png", ["a b.png"]),
        ("a.png 'a b.png'", ["a.png", "a b.png"]),
        ("it's.png", ["it's.png"]),
        ("no'such.png", ["no'such.png"]),
        ("no such.png", ["no", "such.png"]),
    ],
)
def test_paths_are_read_as_they_are_meant(argument: str, names: list[str], folder: Path) -> None:
    assert paths_in(argument) == [Path(name) for name in names]


@pytest.mark.parametrize("argument", ["~/a.png", '"~/a.png"', "'~/a b.png'", "~/album/c.png"])
def test_a_tilde_is_the_home(argument: str, folder: Path) -> None:
    (path,) = paths_in(argument)
    assert path.is_file()


def test_a_home_of_nobody_is_taken_as_it_is(folder: Path) -> None:
    assert paths_in("~nobody-of-this-name/a.png") == [Path("~nobody-of-this-name/a.png")]


@pytest.mark.parametrize(
    ("line", "lines"),
    [
        ("", []),
        ("What", []),
        ("/im", ["/image "]),
        ("/", [f"{name} " if what else name for name, (what, _) in COMMANDS.items()]),
        ("/system a", []),
        ("/image al", ["/image album/"]),
        ("/image album/", ["/image album/c.png"]),
        ("/image ~", ["/image ~/"]),
        ("/image ~/al", ["/image ~/album/"]),
        ("/image a b", ["/image a b.png"]),
        ("/image 'a b", ["/image 'a b.png'"]),
        ("/image .h", ["/image .hidden.png"]),
        ("/image ", ["/image a b.png", "/image a.png", "/image album/", "/image it's.png"]),
        ("/image no/such/", []),
        ("/image a.png/", []),
    ],
)
def test_tab_completes_commands_and_paths(line: str, lines: list[str], folder: Path) -> None:
    assert completions(line) == lines


@pytest.mark.parametrize(
    ("line", "fact"),
    [
        ("/nothing", "no such command: /nothing. /help lists them"),
        ("/image", "/image lacks a path"),
        ("/clear all", "/clear takes nothing after it: all"),
    ],
)
def test_what_is_no_command_is_refused(line: str, fact: str) -> None:
    with pytest.raises(RequestError, match=fact):
        parse_command(line)


def test_help_names_every_command() -> None:
    assert all(name in HELP for name in COMMANDS)
