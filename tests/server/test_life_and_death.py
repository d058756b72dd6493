"""How a server ends: asked to, by its engine's death, or without having started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import forking
from installing import engine, write_distribution
from serving import ENGINE, ServerProcess, environment, sse_events, wait_until

LONG = {"prompt": "circle", "ignore_eos": True, "stream": True}


def test_sigterm_lets_streams_finish_and_leaves_nothing(tmp_path: Path) -> None:
    with (
        ServerProcess(tmp_path, "--kv-cache-memory", "64MiB", fresh=True) as server,
        httpx.Client(base_url=server.url, timeout=30) as idle,
    ):
        assert idle.get("/health").status_code == 200  # keeps its connection

        def refuses_newcomers() -> bool:
            try:
                httpx.get(f"{server.url}/health", timeout=30)
            except (httpx.NetworkError, httpx.RemoteProtocolError):  # not: slow to answer
                return True
            return False

        body = {**LONG, "max_tokens": 1000}
        with server.http.stream("POST", "/v1/completions", json=body) as response:
            events = sse_events(response.iter_lines())
            next(events)
            server.process.send_signal(signal.SIGTERM)
            wait_until(refuses_newcomers, "newcomers to be refused")
            rest = list(events)
        assert rest[-1] == "[DONE]"
        assert json.loads(rest[-2])["choices"][0]["finish_reason"] == "length"
        assert server.process.wait(60) == 0
        assert server.leftovers() == []
        assert "Traceback" not in server.output


def test_ctrl_c_ends_it_with_0(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, "--kv-cache-memory", "64MiB", fresh=True) as server:
        for pid in (*server.children, server.process.pid):  # as a terminal does, to the group
            os.kill(pid, signal.SIGINT)
        assert server.process.wait(60) == 0
        assert server.leftovers() == []
        assert "Traceback" not in server.output


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_what_outlasts_the_drain_ends_in_a_proper_error(tmp_path: Path, stream: bool) -> None:
    with ServerProcess(tmp_path, settings={"drain_timeout": 0.5}) as server:
        host, port = server.url.removeprefix("http://").split(":")
        body = json.dumps({**LONG, "max_tokens": 4000, "stream": stream}).encode()
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}"
            connection.sendall(head.encode() + b"\r\n\r\n" + body)
            wait_until(lambda: server.metric("mm_engine_num_requests_running") == 1, "it to run")
            start = time.monotonic()
            assert server.terminate() == 0
            # The default is 30 s; what the process takes to end is the machine's affair.
            assert 0.4 < time.monotonic() - start < 25
            answer = b"".join(iter(lambda: connection.recv(2**16), b""))
        assert b"the server is shutting down" in answer
        assert answer.startswith(b"HTTP/1.1 200 " if stream else b"HTTP/1.1 503 ")
        assert b"[DONE]" not in answer
        assert server.leftovers() == []


def test_when_the_engine_is_killed_clients_and_health_are_told(tmp_path: Path) -> None:
    settings = {"dead_engine_timeout": 4.0, "max_engine_restarts": 0}
    with ServerProcess(tmp_path, settings=settings) as server:
        body = {**LONG, "max_tokens": 4000}
        own = {"input": "circle", "ignore_eos": True, "stream": True, "max_output_tokens": 2000}
        with (
            server.http.stream("POST", "/v1/completions", json=body) as response,
            server.http.stream("POST", "/v1/responses", json=own) as other,
        ):
            events = sse_events(response.iter_lines())
            next(events)
            lines = other.iter_lines()
            assert next(lines) == "event: response.created"
            assert server.http.get("/health").status_code == 200
            for pid in server.children:
                os.kill(pid, signal.SIGKILL)
            rest = list(events)
            name, data = [line for line in lines if line][-2:]
        assert json.loads(rest[-1])["error"]["type"] == "engine_dead"
        failed = json.loads(data.removeprefix("data: "))
        assert name == "event: response.failed" == f"event: {failed['type']}"
        assert failed["response"]["status"] == "failed"
        assert failed["response"]["error"]["code"] == "server_error"
        assert failed["response"]["error"]["message"].startswith("the engine")
        health = server.http.get("/health")
        assert health.status_code == 503
        assert health.json()["error"]["type"] == "engine_dead"
        refused = server.http.post("/v1/completions", json={"prompt": "x"})
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "engine_dead")
        assert server.metric("mm_engine_up") == 0
        assert server.process.wait(60) == 1
        assert server.leftovers() == []
        assert "Traceback" not in server.output


def run(*arguments: str, tmp: Path, seconds: float = 60) -> subprocess.CompletedProcess[str]:
    return forking.run([ENGINE, *arguments], timeout=seconds, env=environment(tmp))


def check_refusal(done: subprocess.CompletedProcess[str], *parts: str, tmp: Path) -> None:
    assert done.returncode == 1
    lines = done.stderr.strip().splitlines()
    assert lines[-1].startswith("error: ")
    for part in parts:
        assert part in lines[-1]
    assert "Traceback" not in done.stderr
    assert list(tmp.rglob("*")) == []


def test_a_port_in_use_is_said_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        done = run("serve", "/no/such/model", "--port", port, tmp=tmp_path)
    check_refusal(done, f"can't listen on 127.0.0.1 port {port}", "--port", tmp=tmp_path)


def test_an_address_of_another_machine_is_refused(tmp_path: Path) -> None:
    check_refusal(
        run("serve", "--host", "192.0.2.1", "--port", "0", tmp=tmp_path), "192.0.2.1", tmp=tmp_path
    )


def test_a_missing_checkpoint_is_one_sentence(tmp_path: Path) -> None:
    done = run("serve", "/no/such/model", "--port", "0", tmp=tmp_path)
    check_refusal(done, "/no/such/model", tmp=tmp_path)


def test_a_corrupt_shard_is_one_sentence(demo_copy: Path, tmp_path: Path) -> None:
    weights = demo_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    done = run("serve", str(demo_copy), "--port", "0", tmp=tmp_path)
    check_refusal(done, "model.safetensors", tmp=tmp_path)


def test_an_architecture_that_nobody_serves_is_one_sentence(
    demo_copy: Path, tmp_path: Path
) -> None:
    config = json.loads((demo_copy / "config.json").read_text())
    config["architectures"] = ["NobodyForConditionalGeneration"]
    (demo_copy / "config.json").write_text(json.dumps(config))
    done = run("serve", str(demo_copy), "--port", "0", tmp=tmp_path)
    check_refusal(done, "NobodyForConditionalGeneration", tmp=tmp_path)


def test_two_claimants_are_one_sentence_that_names_both(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row 33: and the flag that chooses."""
    architecture = "LlavaForConditionalGeneration"
    site, tmp = tmp_path / "site", tmp_path / "tmp"
    tmp.mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp))
    write_distribution(site, "mm-other", "2.0", plugins={architecture: "mm_other"})
    done = engine("serve", "llava-demo", "--port", "0", path=[site])
    choice = f"--plugin {architecture}=mm-"
    check_refusal(done, "mm-llava 0.1.0", "mm-other 2.0", choice, tmp=tmp)


COUNTING = """
import gc, os, signal, sys
from mm_engine.config import EngineConfig
from mm_engine.plugins.discovery import demos
from mm_engine.server.run import serve
from mm_engine.server.settings import ServerSettings


def count(started):
    print(len(gc.get_objects()), flush=True)
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    config = EngineConfig(model=min(demos()), kv_cache_memory=2**26, progress=False)
    sys.exit(serve(config, ServerSettings(served_model_names=("x",), port=0), count))
"""


def test_a_server_looks_for_garbage_among_new_objects_alone(tmp_path: Path) -> None:
    """Hundreds of thousands are imported; to go through them would stop every answer."""
    script = tmp_path / "counting.py"
    script.write_text(COUNTING)
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True
    )
    assert int(done.stdout) < 5000


def test_sigterm_while_loading_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [ENGINE, "serve", "--port", "0"],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )

    def children() -> list[str]:
        listed = subprocess.run(
            ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=False
        )
        return listed.stdout.split()

    wait_until(lambda: bool(children()) or process.poll() is not None, "the engine process", 60)
    started = children()
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "Traceback" not in errors
    running = subprocess.run(
        ["ps", "-o", "pid=", "-p", ",".join(started)], capture_output=True, text=True, check=False
    )
    assert running.stdout.split() == []
    assert list(tmp_path.rglob("*")) == []
