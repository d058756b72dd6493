"""The command line itself: fast help, versions, errors on one line."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from serving import ENGINE


def engine(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ENGINE, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


PLUGINS_COMMANDS = tuple(f"plugins {name}" for name in ("list", "new", "doctor", "trace"))
BENCH_COMMANDS = tuple(f"bench {name}" for name in ("latency", "throughput", "serve", "startup"))
COMMANDS = ("", "serve", "chat", "generate", "bench", *BENCH_COMMANDS, "plugins", *PLUGINS_COMMANDS)


@pytest.mark.parametrize("command", [command.split() for command in COMMANDS], ids=COMMANDS)
def test_help_teaches_and_needs_no_torch(command: list[str]) -> None:
    code = (
        "import sys; sys.argv = ['engine', *sys.argv[1:]]\n"
        "from mm_engine.cli.main import main\n"
        "try: main()\n"
        "finally: print('heavy:', {'torch', 'transformers', 'fastapi'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *command, "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "Usage: engine" in done.stdout
    assert "heavy: set()" in done.stdout


def test_help_of_serve_has_vllms_names() -> None:
    shown = engine("serve", "--help").stdout
    for flag in ("--host", "--port", "--dtype", "--max-model-len", "--api-key", "--block-size"):
        assert flag in shown


def test_version_names_the_plugins() -> None:
    lines = engine("--version").stdout.splitlines()
    assert lines[0] == f"mm-engine {metadata.version('mm-engine')}"
    assert f"mm-llava {metadata.version('mm-llava')}" in lines[1:]


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        (["serve", "--kv-cache-memory", "lots"], "--kv-cache-memory is no size: lots"),
        (["serve", "--limit-mm-per-prompt", "4"], "--limit-mm-per-prompt can't be read: 4"),
        (["serve", "--allowed-media-domains", "a.com,*.com"], "names too much: *.com"),
        (["serve", "--allowed-media-domains", "http://a.com"], "can't be read: http://a.com"),
        (["serve", "--allowed-local-media-path", "/no/such"], "is no folder: /no/such"),
        (["serve", "--speculative-config", "ngram"], "can't be read: 'ngram'"),
        (["bench", "latency", "--speculative-config", "[5]"], "can't be read: [5]"),
        (["serve", "--speculative-config", '{"method": "eagle"}'], "isn't known: 'eagle'"),
        (["generate", "x", "-m", "/no/such"], "/no/such"),
        (["generate", "x", "-i", "/no/such.png"], "the picture can't be read: /no/such.png"),
        (["generate", "x", "-i", __file__], "not a PNG, JPEG, WebP or GIF"),
    ],
)
def test_an_error_is_one_line_and_exit_code_1(arguments: list[str], fact: str) -> None:
    done = engine(*arguments)
    assert done.returncode == 1
    assert done.stdout == ""
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert fact in line


@pytest.mark.parametrize("arguments", [["serve", "--port", "x"], ["nonsense"], ["generate"]])
def test_a_mistyped_command_is_exit_code_2(arguments: list[str]) -> None:
    assert engine(*arguments).returncode == 2


def test_without_a_plugin_serve_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.argv = ['engine', 'serve']\n"
        "from importlib import metadata\n"
        "metadata.distributions = lambda **kw: iter(())\n"  # as in an environment without any
        "from mm_engine.cli.main import main\n"
        "main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert "pip install mm-llava" in done.stderr
