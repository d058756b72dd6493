"""`engine plugins check`: what it prints and its exit codes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

from installing import engine
from serving import ENGINE
from wrong_plugins import RIGHT, WRONG_PLUGINS, edited


def test_plugin_that_passes_exits_with_0() -> None:
    done = engine("plugins", "check", "mm-llava", "--only", "hooks-fit", "--only", "mapper-keys")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "mm-llava 0.1.0 · LlavaForConditionalGeneration"
    assert "  ✓ hooks-fit    model_class, max_tokens; 4 by default" in lines
    assert "  ✓ mapper-keys  pixel_values" in lines
    assert lines[-1].startswith("2 passed in ")


def test_plugin_that_fails_exits_with_1_and_says_why(tmp_path: Path, llava: Path) -> None:
    file = WRONG_PLUGINS["hook-misspelt"].write(tmp_path)
    done = engine("plugins", "check", str(file), "--model", str(llava))
    assert done.returncode == 1
    assert "✗ hooks-fit · input_procesor (hook_misspelt.py:" in done.stdout
    assert "look at   Did you mean input_processor(ctx, inputs)?" in done.stdout
    assert "because hooks-fit failed" in done.stdout


def test_json_is_all_that_is_on_stdout(tmp_path: Path, llava: Path) -> None:
    file = tmp_path / "chatty.py"
    file.write_text(RIGHT + "\nprint('hello from the plugin')\n")
    done = engine(
        "plugins", "check", str(file), "-m", str(llava), "--json", "--only", "placeholder-text"
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["passed"] is True
    assert [result["name"] for result in report["results"]] == ["placeholder-text"]
    assert report["results"][0]["detail"] == "'<image>'"


def test_ctrl_c_ends_it_while_a_model_computes(tmp_path: Path, llava: Path) -> None:
    file, started = tmp_path / "endless.py", tmp_path / "started"
    mark, indent = "        # embed_images\n", " " * 8
    note = f"{indent}open({str(started)!r}, 'w').close()\n"
    loop = f"{indent}while True: torch.ones(9, 9).mm(torch.ones(9, 9))\n"
    file.write_text(edited((mark, note + loop)))
    process = subprocess.Popen(
        [ENGINE, "plugins", "check", str(file), "-m", str(llava), "--only", "encoder-output"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert stdout == b""


def test_unknown_plugin_exits_with_2() -> None:
    done = engine("plugins", "check", "mm-nothing")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no such plugin is installed: mm-nothing. ")


def test_unknown_check_exits_with_2() -> None:
    done = engine("plugins", "check", "mm-llava", "--only", "nonsense")
    assert done.returncode == 2
    assert "error: there is no such check: nonsense. Choose from hooks-fit" in done.stderr


def test_missing_argument_exits_with_2() -> None:
    assert engine("plugins", "check").returncode == 2
