"""What hangs where no time limit can end it: seen from outside, told, and ended."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import httpx
import pytest

from mm_engine.errors import PluginError
from mm_engine.plugins import blame
from pictures import data_url, encode, quarters
from serving import ServerProcess, wait_until
from wrong_plugins import edited

HANGS = edited(("        # embed_images\n", "        while int(width[0]) == 64: time.sleep(0.1)\n"))


def ask(server: ServerProcess, width: int) -> httpx.Response:
    image = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(width, 30)))}}
    body = {"messages": [{"role": "user", "content": [image]}], "max_tokens": 2}
    return server.http.post("/v1/chat/completions", json=body)


def test_encoder_that_hangs_ends_its_engine_and_is_told(llava: Path, tmp_path: Path) -> None:
    """And another engine takes its place."""
    plugin = tmp_path / "hangs.py"
    plugin.write_text(HANGS)
    (tmp_path / "server").mkdir()
    flags = (str(llava), "--plugin", str(plugin), "--step-timeout", "3")
    with ServerProcess(tmp_path / "server", *flags, "--kv-cache-memory", "16MiB") as server:
        assert ask(server, 40).status_code == 200
        (engine,) = server.children
        reply = ask(server, 64)
        assert reply.status_code == 503
        assert "a step took longer than 3 s" in reply.json()["error"]["message"]
        assert server.http.get("/health").status_code == 503
        assert "the engine is stuck: a step takes longer than 3 s" in server.output
        wait_until(lambda: server.http.get("/ready").status_code == 200, "the next engine", 60)
        assert not Path(f"/proc/{engine}").exists()
        assert ask(server, 40).status_code == 200
        server.children = server._children()


def test_engine_that_is_only_busy_is_left_alone(llava: Path, tmp_path: Path) -> None:
    """Many steps, each within the limit, that together take longer."""
    plugin = tmp_path / "slow.py"
    plugin.write_text(edited(("        # forward\n", "        time.sleep(0.3)\n")))
    (tmp_path / "server").mkdir()
    flags = (str(llava), "--plugin", str(plugin), "--step-timeout", "3")
    with ServerProcess(tmp_path / "server", *flags, "--kv-cache-memory", "16MiB") as server:
        start = time.monotonic()
        body = {"prompt": "a", "max_tokens": 16, "ignore_eos": True}
        assert server.http.post("/v1/completions", json=body).status_code == 200
        assert time.monotonic() - start > 4
        assert server.http.get("/health").status_code == 200


def test_health_says_when_too_many_hooks_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    end = threading.Event()
    monkeypatch.setattr(blame, "MAX_HANGING_CALLS", 2)
    before = blame.num_hanging_calls()
    try:
        for number in range(2 - before):
            assert not blame.no_more_calls(), number
            with pytest.raises(PluginError, match="took longer than 0.05 s"):
                blame.with_time_limit(end.wait, 0.05, "mm-foo · hook")
        assert blame.no_more_calls()
    finally:
        end.set()
    wait_until(lambda: not blame.no_more_calls(), "they have ended")
