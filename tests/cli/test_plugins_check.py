"""`engine plugins check`: what it prints and its exit codes."""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import time
from pathlib import Path

from installing import engine
from serving import ENGINE
from wrong_plugins import RIGHT, WRONG_PLUGINS, edited


def test_plugin_that_passes_exits_with_0() -> None:
    only = ("--only", "hooks-fit", "--only", "mapper-keys")
    done = engine("plugins", "check", "mm-llava", *only, fresh=True)
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


def test_plugin_that_ends_the_interpreter_is_a_failure_that_names_it(tmp_path: Path) -> None:
    file = tmp_path / "ends.py"
    file.write_text("import os; os._exit(0)")
    line = "the plugin {} ended the interpreter with exit code 0{}. Repair it."
    done = engine("plugins", "check", str(file), "-m", "llava-demo", "--json")
    assert done.returncode == 1
    expected = line.format(file, " during the check hooks-fit")
    assert json.loads(done.stdout) == {"error": expected}
    assert done.stderr == f"error: {expected}\n"
    done = engine("plugins", "trace", "llava-demo", "--plugin", str(file), "--json")
    assert done.returncode == 1
    version = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    assert json.loads(done.stdout) == {"error": line.format(f"ends.py sha256:{version}", "")}


def test_mapper_that_computes_for_ever_does_not_abort_the_command(tmp_path: Path) -> None:
    file = tmp_path / "endless.py"
    file.write_text(
        "from mm_llava.plugin import *\nimport torch\n"
        "def loop(ctx, item):\n"
        "    while True: a = torch.randn(512, 512); (a @ a).softmax(0)\n"
        "@hookimpl\ndef register_input_mapper(ctx, register): register('image', loop)\n"
    )
    arguments = ("check", str(file), "-m", "llava-demo", "--only", "mapper-keys")
    done = engine("plugins", *arguments, fresh=True)  # it is about an interpreter's end
    assert done.returncode == 1, done.stderr
    assert "took longer than 10 s" in done.stdout
    assert "terminate called" not in done.stderr


def test_raw_prints_of_a_plugin_go_to_stderr(tmp_path: Path) -> None:
    file = tmp_path / "noisy.py"
    file.write_text(
        "from mm_llava.plugin import *\nimport os, subprocess\n"
        "print('noise'); os.write(1, b'noise'); subprocess.run(['echo', 'noise'])\n"
        "os.fork()\n"
    )
    done = engine(
        "plugins", "check", str(file), "-m", "llava-demo", "--json", "--only", "hooks-fit"
    )
    assert json.loads(done.stdout)["passed"] is True
    done = engine("plugins", "trace", "llava-demo", "--plugin", str(file), "--json")
    assert json.loads(done.stdout)["error"] is None


def test_refusals_are_json_too(tmp_path: Path) -> None:
    done = engine("plugins", "check", "mm-nothing", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["error"].startswith("no such plugin is installed: mm-nothing. ")
    done = engine("plugins", "trace", str(tmp_path), "--json")
    assert done.returncode == 1
    assert "config.json" in json.loads(done.stdout)["error"]


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
