"""Ranks without their imports: forked from one process that has imported everything.

A rank's own start takes seconds of imports, and the tests start hundreds. What is forked runs the
rank's `main` unchanged. Some tests start real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from mm_engine.worker import ranks

SERVER = """
import json, os, signal, sys
from pathlib import Path
from mm_engine.worker import rank, rank_group, rank_wire, model_shard, loader
from mm_engine.models import decoder
import mm_llava.plugin, mm_llava_next.plugin
del sys.modules["mm_llava.plugin"], sys.modules["mm_llava_next.plugin"]  # a rank loads its own
codes = {}
print("ready", flush=True)
for line in sys.stdin:
    told = json.loads(line)
    if "fork" in told:
        folder, number, _, level, style = told["fork"]
        parent = os.getpid()
        pid = os.fork()
        if not pid:
            code = 1
            try:
                os.dup2(os.open("/dev/null", os.O_RDONLY), 0)
                os.dup2(2, 1)
                code = rank.main(Path(folder), int(number), parent, int(level), style)
            finally:
                os._exit(code)
        print(pid, flush=True)
    else:
        number = told["poll"]
        if number not in codes:  # it is asked by more than one thread
            pid, status = os.waitpid(number, os.WNOHANG)
            if pid:
                codes[pid] = os.waitstatus_to_exitcode(status)
        print(json.dumps(codes.get(number)), flush=True)
"""


class Zygote:
    """The process that ranks are forked from."""

    def __init__(self) -> None:
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path},
        )
        self._lock = threading.Lock()
        assert self._read() == "ready"

    def spawn(self, module: str, *arguments: object) -> Forked:
        """In place of `processes.spawn`."""
        assert module == "mm_engine.worker.rank"
        return Forked(self, int(self.ask({"fork": [str(argument) for argument in arguments]})))

    def ask(self, told: dict[str, Any]) -> str:
        """The server's answer, one at a time."""
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(told) + "\n")
            self._process.stdin.flush()
            return self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        """End it; its children notice."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()


class Forked:
    """A forked process, with what `Ranks` uses of `subprocess.Popen`."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self.pid = pid
        self._zygote = zygote
        self._code: int | None = None

    def poll(self) -> int | None:
        if self._code is None:
            try:
                self._code = json.loads(self._zygote.ask({"poll": self.pid}))
            except ValueError:  # the tests are over: it ends with the zygote
                self._code = -signal.SIGKILL
        return self._code

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + (float("inf") if timeout is None else timeout)
        while (code := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("rank", timeout or 0.0)
            time.sleep(0.01)
        return code

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


@contextmanager
def forking() -> Iterator[None]:
    """While this lasts, ranks are forked."""
    zygote = Zygote()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "spawn", zygote.spawn)
        yield
    zygote.close()
