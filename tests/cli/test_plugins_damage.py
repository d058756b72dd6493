"""What one broken distribution may do to `engine`: nothing but be told of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from installing import engine, write_distribution


def broken(folder: Path, name: str, code: str) -> None:
    module = name.replace("-", "_")
    write_distribution(folder, name, plugins={module: module}, files={f"{module}.py": code})


@pytest.mark.parametrize("points", [b"[console_scripts]\nno equals sign\n", b"[x]\ny = \xff\n"])
def test_entry_points_that_cannot_be_parsed_harm_nobody_else(tmp_path: Path, points: bytes) -> None:
    """Python reads all distributions' entry points at once, when torch is imported too."""
    info = write_distribution(tmp_path, "some-other")
    (info / "entry_points.txt").write_bytes(points)
    done = engine("plugins", "doctor", "--json", path=[tmp_path], fresh=True)
    assert (done.returncode, done.stderr) == (1, "")
    (found,) = json.loads(done.stdout)["findings"]
    assert found["kind"] == "damaged-metadata"
    assert "entry_points.txt can't be parsed" in found["problem"]
    assert found["cure"] == "pip install --force-reinstall --no-deps some-other"
    done = engine("plugins", "list", "--json", path=[tmp_path], fresh=True)
    assert {row["state"] for row in json.loads(done.stdout)} == {"ok"}
    assert done.stderr.startswith("damaged: some-other 0.1.0 (entry_points.txt can't be parsed ")
    done = engine("generate", "llava-demo", "--max-tokens", "1", path=[tmp_path], fresh=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("seconds", ["inf", "1e10", "nan", "86401"])
def test_time_that_no_clock_takes_is_refused(seconds: str) -> None:
    assert engine("plugins", "doctor", "--timeout", seconds).returncode == 2
    assert engine("serve", "--hook-timeout", seconds).returncode == 2


def test_engine_that_cannot_be_probed_is_json_too(tmp_path: Path) -> None:
    (tmp_path / "transformers.py").write_text("raise RuntimeError('no luck')")
    done = engine("plugins", "list", "--json", path=[tmp_path], fresh=True)
    assert done.returncode == 1
    assert "mm-engine can't be imported" in json.loads(done.stdout)["error"]


def test_escape_sequences_of_a_plugin_are_shown_not_obeyed(tmp_path: Path) -> None:
    broken(tmp_path, "mm-test-colour", r"raise KeyError('\x1b[31m', '[/INST] \ud800')")
    broken(tmp_path, "mm-test-raw", r"raise ValueError('\x1b[31m [/INST] \ud800')")
    for command in ("doctor", "list"):
        done = engine("plugins", command, path=[tmp_path])
        assert done.stderr == ""
        assert "\x1b" not in done.stdout
        assert r"\x1b[31m" in done.stdout and r"\ud800" in done.stdout
        assert done.stdout.count("[/INST]") == 2


def test_escape_sequences_in_a_report_are_shown_not_obeyed(tmp_path: Path) -> None:
    file = tmp_path / "colour.py"
    file.write_text(r"raise ValueError('\x1b[31m [/INST] \ud800')")
    plain = engine("plugins", "check", str(file), "-m", "llava-demo", "--only", "hooks-fit")
    assert plain.returncode == 1
    assert r"raised ValueError: \x1b[31m [/INST] \ud800" in plain.stdout
    json_too = engine("plugins", "check", str(file), "-m", "llava-demo", "--json")
    assert r"\x1b[31m [/INST] \ud800" in json.loads(json_too.stdout)["results"][0]["got"]
    trace = engine("plugins", "trace", "llava-demo", "--plugin", str(file))
    assert trace.returncode == 1
    assert r"raised ValueError: \x1b[31m [/INST] \ud800" in trace.stderr
