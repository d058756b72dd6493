"""`engine serve` in a process of its own, for tests over real sockets."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from openai import OpenAI

import forking
from mm_engine.plugins.discovery import demos

ENGINE = str(Path(sys.executable).with_name("engine"))
START_SECONDS = 120.0
#: Flags of a server with the demo: in float32 an answer doesn't depend on what else is in a step.
FLAGS = ("--dtype", "float32", "--kv-cache-memory", "64MiB", "--served-model-name", "demo")
KEY = "correct-horse-battery-staple"  # of servers that want one
#: The same server with settings that have no flags.
WITH_SETTINGS = """
import sys
from mm_engine.config import EngineConfig
from mm_engine.server.log import configure_logging
from mm_engine.server.run import serve
from mm_engine.server.settings import ServerSettings

if __name__ == "__main__":
    configure_logging("info", "text")
    defaults = {{"model": {model!r}, "kv_cache_memory": 2**26, "progress": False}}
    config = EngineConfig(**(defaults | {config!r}))
    settings = ServerSettings(served_model_names=("demo",), port=0, **{settings!r})
    sys.exit(serve(config, settings, lambda s: print(f"address {{s.url}}/v1", flush=True)))
"""


def wait_until(ready: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
    """Poll; fails the test when time is up, which is long for what takes an instant."""
    deadline = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {seconds:g} s: {what}")
        time.sleep(0.02)


def environment(tmp: Path, **variables: str) -> dict[str, str]:
    """The environment of a process whose temporary files are to lie in `tmp`."""
    return {
        **os.environ,
        "TMPDIR": str(tmp),
        "TORCHINDUCTOR_CACHE_DIR": str(tmp.parent / "inductor"),  # torch's own, which it keeps
        "OMP_NUM_THREADS": "1",
        **variables,
    }


class ServerProcess:
    """A server on a free port, ready when made; killed with its children on leaving.

    `folder` takes its output, and its temporary files under `tmp`. With `settings` (fields of
    `ServerSettings`) it serves the demo without the command line, and with fields of the engine's
    `config`. `program` is another `engine`
    than this environment's. A `fresh` one is started as a user does, others are forked.
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        env: dict[str, str] | None = None,
        settings: dict[str, Any] | None = None,
        config: dict[str, Any] | None = None,
        program: Sequence[str] = (ENGINE,),
        fresh: bool = False,
    ) -> None:
        self.tmp = folder / "tmp"
        self.tmp.mkdir()
        self.log = folder / "log"
        command = [*program, "serve", "--port", "0", *flags]
        if settings is not None:
            script = folder / "script.py"
            script.write_text(
                WITH_SETTINGS.format(model=min(demos()), settings=settings, config=config or {})
            )
            command = [sys.executable, str(script)]
        popen = subprocess.Popen if fresh or program != (ENGINE,) else forking.Popen
        with self.log.open("wb") as log:
            self.process: subprocess.Popen[Any] = popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment(self.tmp, **(env or {})),
            )
        try:
            self.url = self._wait_for_address()
        except BaseException:
            self.kill()
            raise
        self.children = self._children()
        self.http = httpx.Client(base_url=self.url, timeout=60)

    def _wait_for_address(self) -> str:
        found: list[str] = []

        def ready() -> bool:
            if self.process.poll() is not None:
                raise AssertionError(f"exited with {self.process.returncode}:\n{self.output}")
            found[:] = re.findall(r"address +(https?://\S+?)/v1", self.output)
            return bool(found)

        wait_until(ready, "the server's address", START_SECONDS)
        return found[0]

    def _children(self) -> list[int]:
        listed = subprocess.run(
            ["pgrep", "-P", str(self.process.pid)], capture_output=True, text=True, check=False
        )
        return [int(pid) for pid in listed.stdout.split()]

    @property
    def output(self) -> str:
        """What it has printed and logged so far."""
        return self.log.read_text("utf-8", "replace")

    def client(self, key: str = "none") -> contextlib.closing[OpenAI]:
        """The `openai` client for it; it doesn't try again on its own."""
        return contextlib.closing(
            OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)
        )

    def metric(self, name: str, key: str | None = None) -> float:
        """The value of a metric; its name has the labels, if any: `x_total{route="/health"}`."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        text = self.http.get("/metrics", headers=headers).text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, text
        return float(found[1])

    def gauges(self, *names: str) -> dict[str, float]:
        """Several metrics of one moment, by their names without `mm_engine_`."""
        text = self.http.get("/metrics").text
        told = dict(re.findall(r"^mm_engine_(\w+) (\S+)$", text, re.MULTILINE))
        assert told.keys() >= set(names), text
        return {name: float(told[name]) for name in names}

    @property
    def is_idle(self) -> bool:
        """Whether the engine holds nothing for anybody."""
        names = (
            "num_requests_running",
            "num_requests_waiting",
            "num_used_blocks",
            "num_requests_in_flight",
        )
        return not any(self.gauges(*names).values())

    def terminate(self, seconds: float = 40.0) -> int:
        """Send SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)

    def leftovers(self) -> list[str]:
        """Processes and temporary files that are still there."""
        pids = [f"process {pid}" for pid in self.children if _is_running(pid)]
        return pids + [str(path) for path in self.tmp.rglob("*")]

    def kill(self) -> None:
        """End it and its children at once."""
        for pid in [self.process.pid, *getattr(self, "children", self._children())]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.http.close()
        self.kill()


def _is_running(pid: int) -> bool:
    state = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(state) and not state.startswith("Z")


def sse_events(lines: Iterator[str]) -> Iterator[str]:
    """The data of each event of a stream."""
    for line in lines:
        if line:
            assert line.startswith("data: "), line
            yield line.removeprefix("data: ")
