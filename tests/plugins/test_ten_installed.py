"""Ten plugins are installed, one serves: no other is ever imported, in either process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from serving import ENGINE, ServerProcess

NUM_PLUGINS = 10
CHOSEN = 7
ARCHITECTURE = "LlavaForConditionalGeneration"
#: Each says that it was imported, by whom; then most of them break.
SOURCE = """
import os
with open({log!r}, "a") as log:
    log.write(f"{name} {{os.getpid()}}\\n")
{rest}
"""
LLM = """
import sys
from mm_engine import LLM, SamplingParams
llm = LLM({model!r}, plugins=({choice!r},), progress=False)
print(len(llm.generate("a", SamplingParams(max_tokens=3, ignore_eos=True))[0].outputs[0].token_ids))
print(*sorted(name for name in sys.modules if name.startswith("mm_ten_")))
"""
CHOICE = f"{ARCHITECTURE}=mm-ten-{CHOSEN}"


@pytest.fixture
def ten(tmp_path: Path) -> tuple[dict[str, str], Callable[[], list[tuple[str, int]]]]:
    """The environment in which they are installed, and what was imported: (name, pid)."""
    log = tmp_path / "imported"
    log.touch()
    for number in range(NUM_PLUGINS):
        name = f"mm_ten_{number}"
        info = tmp_path / "site" / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        serves = ARCHITECTURE if number == CHOSEN else f"Ten{number}ForConditionalGeneration"
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\nRequires-Dist: mm-engine>=0.1\n"
        )
        (info / "entry_points.txt").write_text(
            f"[mm_engine.plugins]\n{serves} = {name}.plugin\n"
            f"[mm_engine.demos]\nten-{number} = {name}.demo\n"
        )
        package = tmp_path / "site" / name
        (package / "demo").mkdir(parents=True)
        rest = "from mm_llava.plugin import *" if number == CHOSEN else "raise SystemExit('broken')"
        (package / "__init__.py").write_text(SOURCE.format(log=str(log), name=name, rest=""))
        (package / "plugin.py").write_text(SOURCE.format(log=str(log), name=name, rest=rest))

    def imported() -> list[tuple[str, int]]:
        pairs = [line.split() for line in log.read_text().splitlines()]
        return [(name, int(pid)) for name, pid in pairs]

    path = os.pathsep.join([str(tmp_path / "site"), *filter(None, [os.getenv("PYTHONPATH")])])
    return {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, imported


Ten = tuple[dict[str, str], Callable[[], list[tuple[str, int]]]]


def run(ten: Ten, *command: str) -> str:
    done = subprocess.run(command, env={**os.environ, **ten[0]}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_server_imports_one_in_each_of_its_processes(ten: Ten, llava: Path, tmp_path: Path) -> None:
    environment, imported = ten
    (tmp_path / "server").mkdir()
    flags = (str(llava), "--plugin", CHOICE, "--kv-cache-memory", "16MiB")
    with ServerProcess(tmp_path / "server", *flags, env=environment) as server:
        listed = server.http.get("/v1/plugins").json()["data"]
        body = {"prompt": "a", "max_tokens": 3, "ignore_eos": True}
        assert server.http.post("/v1/completions", json=body).status_code == 200
        pids = {server.process.pid, *server.children}
        assert len(pids) == 2
        # Package and module, once in the front and once in the engine process.
        assert sorted(imported()) == sorted((f"mm_ten_{CHOSEN}", pid) for pid in [*pids, *pids])
    assert listed[0]["distribution"] == f"mm_ten_{CHOSEN}"
    names = {card["distribution"] for card in listed}
    assert {f"mm_ten_{number}" for number in range(NUM_PLUGINS)} <= names


def test_llm_imports_one(ten: Ten, llava: Path) -> None:
    code = LLM.format(model=str(llava), choice=CHOICE)
    lines = run(ten, sys.executable, "-c", code).splitlines()
    assert lines[-2:] == ["3", f"mm_ten_{CHOSEN} mm_ten_{CHOSEN}.plugin"]
    assert {name for name, _ in ten[1]()} == {f"mm_ten_{CHOSEN}"}


def test_commands_that_only_look_import_none(ten: Ten) -> None:
    assert "mm_ten_3 1.0" in run(ten, ENGINE, "--version")
    assert ten[1]() == []


def test_an_import_would_have_been_seen(ten: Ten) -> None:
    """`engine plugins list` imports each, which is how the tests above could fail."""
    listed = run(ten, ENGINE, "plugins", "list", "--json")
    assert "mm_ten_3" in listed
    assert {name for name, _ in ten[1]()} == {f"mm_ten_{number}" for number in range(NUM_PLUGINS)}


def test_two_owners_of_an_architecture_are_refused_in_one_line_and_not_imported(
    ten: Ten, llava: Path
) -> None:
    """mm-llava claims it as well, and nobody chose."""
    command = [ENGINE, "serve", str(llava), "--port", "0"]
    done = subprocess.run(command, env={**os.environ, **ten[0]}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: more than one installed plugin serves {ARCHITECTURE}: ")
    assert f"mm_ten_{CHOSEN} 1.0" in line and "mm-llava 0.1" in line
    assert f"--plugin {ARCHITECTURE}=" in line
    assert ten[1]() == []
