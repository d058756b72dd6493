"""Servers that benchmarks start for themselves: used, timed, and never left behind."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from click.testing import Result

from mm_engine.cli.bench.server import OwnServer
from mm_engine.errors import StartupError
from serving import ENGINE, environment, wait_until

FLAGS = ("--dtype", "float32", "--kv-cache-memory", "32MiB")
CHILD = "mm_engine.cli.bench.child"
PNG = b"\x89PNG"


def own_servers(process: psutil.Process | None = None) -> list[psutil.Process]:
    children = (process or psutil.Process()).children(recursive=True)
    return [child for child in children if CHILD in child.cmdline()]


def test_a_server_is_started_measured_drawn_and_ended(
    bench: Callable[..., Result], tmp_path: Path
) -> None:
    record, picture = tmp_path / "serve.json", tmp_path / "serve.png"
    load = ("--num-prompts", 9, "--output-len", 4, "--image-size", "50x50", "--request-rate", 100)
    done = bench("serve", *FLAGS, *load, "--json", record, "--plot", picture)
    assert done.exit_code == 0, done.output
    written = json.loads(record.read_text())
    assert written["figures"]["answered"] == 9
    assert written["arguments"]["model"] == "llava-demo"
    assert written["arguments"]["max_decode_slowdown"] == 1.75  # what was measured, not None
    assert picture.read_bytes().startswith(PNG)
    assert own_servers() == []


def test_the_parts_of_a_start_add_up(bench: Callable[..., Result], tmp_path: Path) -> None:
    record, picture = tmp_path / "startup.json", tmp_path / "startup.png"
    done = bench("startup", *FLAGS, "--num-iters", 1, "--json", record, "--plot", picture)
    assert done.exit_code == 0, done.output
    (start,) = json.loads(record.read_text())["figures"]["starts_seconds"]
    ready = start.pop("ready")
    assert set(start) == {"imports", "checkpoint", "engine_process", "weights", "profile"}
    assert all(seconds > 0 for seconds in start.values()), start
    assert sum(start.values()) == pytest.approx(ready)
    assert picture.read_bytes().startswith(PNG)
    assert own_servers() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_load_and_its_server(tmp_path: Path, number: signal.Signals) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    endless = ("--num-prompts", "10000", "--max-concurrency", "2", "--json", str(tmp_path / "no"))
    command = [ENGINE, "bench", "serve", *FLAGS, *endless]
    with (tmp_path / "log").open("wb") as log:
        bench = subprocess.Popen(command, stdout=log, stderr=log, env=environment(temporary))
    process = psutil.Process(bench.pid)
    try:
        wait_until(lambda: bool(own_servers(process)), "the server's process", 60)
        (server,) = own_servers(process)
        if number == signal.SIGINT:  # in the middle of the load; else while the server starts
            wait_until(lambda: bool(server.net_connections("tcp")), "a port", 60)
            wait_until(lambda: len(established(server)) >= 2, "requests", 60)
        family = process.children(recursive=True)
        bench.send_signal(number)
        assert bench.wait(60) == 130
    finally:
        bench.kill()
        bench.wait()
    psutil.wait_procs(family, timeout=10)
    assert [child for child in family if child.is_running()] == []
    assert list(temporary.rglob("*")) == []
    assert "Traceback" not in (tmp_path / "log").read_text()


def established(process: psutil.Process) -> list[object]:
    return [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED]


def test_a_server_whose_parent_is_gone_ends_by_itself() -> None:
    """However early that was: it is told whose child it is, and doesn't have to ask."""
    nobody = str(psutil.Process().pid + 10**6)
    done = subprocess.run([sys.executable, "-m", CHILD, nobody, "{}"], timeout=60)
    assert done.returncode == -signal.SIGTERM


def test_why_a_server_cannot_start_is_told_in_its_own_words(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["Nobodys"]}))
    with (
        pytest.raises(StartupError, match="^(?!the server ended).*Nobodys"),
        OwnServer(str(tmp_path), {"plugins": []}, max_queued_requests=1),
    ):
        pass
    assert own_servers() == []
