"""What can't be measured is said in a line, before anything is loaded."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import Result

from mm_engine.cli.bench import machine
from mm_engine.cli.bench.commands import app


@pytest.mark.parametrize(
    ("arguments", "fact"),
    [
        ("serve --image-size 3x", "--image-size can't be read: 3x"),
        ("latency --image-repeats 0.5", "--image-repeats has no effect: prompts hold 0 images"),
        ("serve --num-images 0 --image-size 9x9", "--image-size has no effect"),
        ("serve --endpoint /v1/completions --num-images 1", "--endpoint takes no images"),
        ("serve --request-rate 0", "--request-rate is out of range: 0"),
        ("serve --request-rate nan", "--request-rate is out of range: nan"),
        ("serve --burstiness -1", "--burstiness is out of range: -1"),
        ("serve --base-url http://a --max-num-seqs 9", "--max-num-seqs has no effect"),
        ("serve --percentile-metrics x", "--percentile-metrics can't be read: x"),
        ("latency --metric-percentiles 50,101", "--metric-percentiles can't be read: 50,101"),
        ("latency --metric-percentiles ,", "--metric-percentiles can't be read: ,"),
        ("latency --batch-size 65", "--batch-size is larger than a step: 65 of 64 sequences"),
        ("latency --plot x.bmp", "--plot has no suffix that is known: x.bmp"),
    ],
)
def test_misused_flags_are_one_line_and_exit_code_2(
    bench: Callable[..., Result], arguments: str, fact: str
) -> None:
    done = bench(*arguments.split())
    assert done.exit_code == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {fact}")


@pytest.mark.parametrize("flag", ["--json", "--plot"])
def test_a_file_that_cannot_be_written_is_told_first(
    bench: Callable[..., Result], flag: str, tmp_path: Path
) -> None:
    done = bench("throughput", "-m", "/no/such", flag, tmp_path / "no" / "x.png")
    assert str(done.exception).startswith(f"{flag} can't be written: ")


def test_without_matplotlib_a_plot_is_refused_before_the_measurement() -> None:
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "sys.argv = ['engine', 'bench', 'startup', '--plot', 'x.png']\n"
        "from mm_engine.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("error: matplotlib is missing")
    assert "pip install 'mm-engine[bench]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_server_is_told_with_its_address(bench: Callable[..., Result]) -> None:
    done = bench("serve", "--base-url", "http://127.0.0.1:9/v1")
    assert str(done.exception).startswith("no server answers: http://127.0.0.1:9 (")


def test_the_extra_for_plots_exists() -> None:
    assert "bench" in (metadata.metadata("mm-engine").get_all("Provides-Extra") or [])


def test_the_four_commands_are_listed_with_an_example_each(bench: Callable[..., Result]) -> None:
    listed = bench("--help").stdout
    names = [command.callback.__name__ for command in app.registered_commands if command.callback]
    assert names == ["latency", "throughput", "serve", "startup"]
    for name in names:
        assert name in listed
        assert f"engine bench {name} -" in bench(name, "--help").stdout


def test_the_machine_the_versions_and_the_commit_are_told() -> None:
    assert "core" in machine.machine()
    assert "GiB" in machine.machine()
    assert machine.versions()["torch"] == metadata.version("torch")
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode == 0:  # a checkout, not an unpacked archive
        assert (machine.commit() or "").removesuffix("-dirty") == head.stdout.strip()


def test_the_repository_around_an_installed_package_is_not_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "theirs"], check=True)
    installed = tmp_path / ".venv" / "machine.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(machine, "__file__", str(installed))
    assert machine.commit() is None
