"""How an engine process ends, or never gets to start: nothing may stay behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine_process import CONFIG, exists
from mm_engine import processes
from mm_engine.engine import client as client_module
from mm_engine.engine.client import EngineClient
from mm_engine.engine.process import SOCKET_NAME
from mm_engine.errors import EngineDead, PluginError, StartupError


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where processes started in this test put their sockets."""
    monkeypatch.setattr(processes.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(processes, "MAX_ADDRESS", 107)
    return tmp_path


def test_when_the_process_is_killed_everybody_is_told(folder, pipeline, ask) -> None:
    async def run() -> None:
        client = await EngineClient.start(CONFIG, pipeline.dummy_request())
        assert len(list(folder.iterdir())) == 1
        first = client.generate(ask(max_tokens=3000))
        await anext(first)
        stats = asyncio.create_task(client.stats())
        os.kill(client.pid, signal.SIGKILL)
        start = time.monotonic()
        with pytest.raises(EngineDead, match="killed by SIGKILL"):
            async for _ in first:
                pass
        assert time.monotonic() - start < 30
        await asyncio.gather(stats, return_exceptions=True)
        assert not client.alive
        with pytest.raises(EngineDead):
            await anext(client.generate(ask()))
        with pytest.raises(EngineDead):
            await client.stats()
        await client.close()
        assert not exists(client.pid)

    asyncio.run(run())
    assert list(folder.iterdir()) == []


def test_closing_ends_the_process_and_what_it_was_answering(
    folder, pipeline, ask, monkeypatch
) -> None:
    monkeypatch.setattr(client_module, "SHUTDOWN_SECONDS", 60.0)  # then it would be killed

    async def run() -> None:
        client = await EngineClient.start(CONFIG, pipeline.dummy_request())
        first = client.generate(ask(max_tokens=3000))
        await anext(first)
        start = time.monotonic()
        await client.close()
        assert time.monotonic() - start < client_module.SHUTDOWN_SECONDS
        with pytest.raises(EngineDead, match="closed"):
            async for _ in first:
                pass
        assert not client.alive
        assert not exists(client.pid)
        await client.close()

    asyncio.run(run())
    assert list(folder.iterdir()) == []


def test_a_process_that_does_not_listen_is_killed(folder, pipeline, monkeypatch) -> None:
    monkeypatch.setattr(client_module, "SHUTDOWN_SECONDS", 0.5)

    async def run() -> None:
        client = await EngineClient.start(CONFIG, pipeline.dummy_request())
        os.kill(client.pid, signal.SIGSTOP)
        await client.close()
        assert not exists(client.pid)

    asyncio.run(run())
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"model": "/no/such/model"}, "/no/such/model"),
        ({"kv_cache_memory": 100}, "kv_cache_memory is too small: 100 bytes"),
        ({"encoder_cache_memory": 100}, "encoder_cache_memory is too small: 100 bytes"),
        ({"dtype": "float7"}, "float7"),
    ],
)
def test_what_cannot_start_says_so_and_leaves_nothing(folder, pipeline, changes, wanted) -> None:
    with pytest.raises(StartupError, match=wanted) as error:
        asyncio.run(EngineClient.start(replace(CONFIG, **changes), pipeline.dummy_request()))
    assert "\n" not in str(error.value)
    assert list(folder.iterdir()) == []


def test_a_plugin_that_fails_on_its_dummy_data_is_named(folder, pipeline) -> None:
    dummy = pipeline.dummy_request()
    item = dummy.items[0]
    tensors = {name: tensor[..., :-1] for name, tensor in item.tensors.items()}
    broken = replace(dummy, items=(replace(item, tensors=tensors),))
    with pytest.raises(PluginError, match=pipeline.plugin.label):
        asyncio.run(EngineClient.start(CONFIG, broken))
    assert list(folder.iterdir()) == []


def test_a_process_that_dies_while_starting_is_noticed(folder, pipeline, monkeypatch) -> None:
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    with pytest.raises(StartupError, match="exit status 1"):
        asyncio.run(EngineClient.start(CONFIG, pipeline.dummy_request()))
    assert list(folder.iterdir()) == []


def test_giving_up_while_it_starts_leaves_nothing(folder, pipeline) -> None:
    async def run() -> int:
        before = set(children())
        task = asyncio.create_task(EngineClient.start(CONFIG, pipeline.dummy_request()))
        async with asyncio.timeout(30):
            while not (started := set(children()) - before):
                await asyncio.sleep(0.05)
        (pid,) = started
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return pid

    assert not exists(asyncio.run(run()))
    assert list(folder.iterdir()) == []


def children() -> list[int]:
    listed = subprocess.run(
        ["pgrep", "-P", str(os.getpid()), "-f", "mm_engine.engine.process"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [int(pid) for pid in listed.stdout.split()]


SCRIPT = """
import asyncio, os, signal
from mm_engine.config import EngineConfig
from mm_engine.engine.client import EngineClient
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.worker.loader import open_model

config = EngineConfig(model={model!r}, kv_cache_memory=2**24, progress=False)
pipeline = InputPipeline(open_model(config))
client = asyncio.run(EngineClient.start(config, pipeline.dummy_request()))
print(client.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_process_ends_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    """And the script that starts it has no `if __name__ == "__main__"`."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(model=CONFIG.model))
    sockets = tmp_path / "s"
    sockets.mkdir()
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(sockets)},
        stdout=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    deadline = time.monotonic() + 30
    while exists(pid) or list(sockets.glob("mm-engine-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_long_temporary_path_is_avoided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("x" * 100)
    long.mkdir()
    monkeypatch.setattr(processes.tempfile, "tempdir", str(long))
    folder = processes.private_folder(SOCKET_NAME)
    folder.rmdir()
    assert len(str(folder)) < processes.MAX_ADDRESS
    assert list(long.iterdir()) == []


def test_nobody_else_can_enter_the_sockets_folder() -> None:
    folder = processes.private_folder(SOCKET_NAME)
    mode = folder.stat().st_mode & 0o777
    folder.rmdir()
    assert mode == 0o700
