"""A server that a benchmark starts for itself, and ends whatever happens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from types import TracebackType
from typing import Any

from mm_engine.cli.bench.child import SERVED_NAME
from mm_engine.errors import StartupError

END_SECONDS = 15.0  # that a server gets after SIGTERM; then it is killed
_CHILD = "mm_engine.cli.bench.child"


class OwnServer:
    """A server process on a free port: starts with `with`, is ready inside, has ended after it.

    `options` are fields of `EngineConfig`. `ready` is what it told of itself.

    Raises:
        StartupError: the model can't be served; the message is the server's own.
    """

    model = SERVED_NAME

    def __init__(self, model: str, options: dict[str, Any], *, max_queued_requests: int) -> None:
        given = {"model": model, **options, "max_queued_requests": max_queued_requests}
        self._command = [sys.executable, "-m", _CHILD, str(os.getpid()), json.dumps(given)]
        self._printed: deque[str] = deque(maxlen=100)  # lines of its stderr
        self.start = 0.0  # `time.monotonic()`
        self.ready: dict[str, Any] = {}

    @property
    def url(self) -> str:
        """Its address, without a path."""
        return str(self.ready["url"])

    def __enter__(self) -> OwnServer:
        # What this process can import, that one can too, and nothing of the current folder.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self.start = time.monotonic()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
            start_new_session=True,  # Ctrl-C is this process's affair
        )
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()
        try:
            self.ready = self._hear("ready")
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._end()

    def _hear(self, event: str) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                told = json.loads(line)
            except ValueError:
                continue  # a plugin printed something
            if isinstance(told, dict) and told.get("event") == event:
                return told
        code = self._process.wait()
        self._reader.join(timeout=5)
        said = [line for line in self._printed if line.startswith("error: ")]
        if said:
            raise StartupError(said[-1].removeprefix("error: "))
        last = self._printed[-1] if self._printed else "nothing"
        raise StartupError(
            f"the server ended while starting: exit status {code}. It printed last: {last}"
        )

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._printed.append(line.strip())

    def _end(self) -> None:
        import psutil

        try:
            processes = [psutil.Process(self._process.pid)]
            processes += processes[0].children(recursive=True)
        except psutil.NoSuchProcess:
            processes = []
        try:
            self._process.terminate()
            self._process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also if Ctrl-C comes again
            for process in processes:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            self._process.wait()
            for stream in (self._process.stdout, self._process.stderr):
                if stream is not None:
                    stream.close()
