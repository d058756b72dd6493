"""`engine` without its imports: forked from a process that has imported torch and its like.

They take a start seconds, and the tests start hundreds. What is forked imports mm-engine and
plugins anew, and runs and ends as a new interpreter does (forkserver.py). Some tests of each
command start real ones, and so do those of what a new interpreter imports.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import subprocess
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any

from forkserver import LARGEST, SUBREAPER, ForkedPopen, prctl

SCRIPT = Path(__file__).with_name("forkserver.py")
#: Variables that nobody reads while being imported. With another one a process is a real one.
READ_LATER = {
    *("PYTHONPATH", "TMPDIR", "COLUMNS", "TORCHINDUCTOR_CACHE_DIR", "MM_ENGINE_API_KEY"),
    "MM_ENGINE_LOG_FORMAT",
    *("PYTEST_CURRENT_TEST", "PYTEST_VERSION"),
}


class ForkServer:
    """The process that others are forked from. It ends with this one."""

    def __init__(self) -> None:
        self._link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._environment = {k: v for k, v in os.environ.items() if k not in READ_LATER}
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, SCRIPT, str(theirs.fileno())],
                env=self._environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._lock = threading.Lock()
        self._imported = set(json.loads(self._link.recv(LARGEST)))

    def suits(self, env: dict[str, str]) -> bool:
        """Whether a new interpreter would have imported the same in this environment."""
        if {k: v for k, v in env.items() if k not in READ_LATER} != self._environment:
            return False
        folders = [Path(entry) for entry in env.get("PYTHONPATH", "").split(os.pathsep) if entry]
        files = [file for folder in folders if folder.is_dir() for file in folder.iterdir()]
        start = {"sitecustomize", "usercustomize"}  # what is run before anything else
        return (self._imported | start).isdisjoint(file.name.partition(".")[0] for file in files)

    def fork(self, order: dict[str, Any], files: list[int]) -> int:
        """A new child of this process."""
        with self._lock:
            prctl(SUBREAPER, 1)  # for as long as it takes to adopt it
            try:
                socket.send_fds(self._link, [json.dumps(order).encode()], files)
                return int(self._link.recv(64))
            finally:
                prctl(SUBREAPER, 0)

    def close(self) -> None:
        """End it; nothing else does that is forked from it."""
        self._link.close()
        self._process.wait(10)


@cache
def fork_server() -> ForkServer:
    """One for all tests of this process."""
    server = ForkServer()
    atexit.register(server.close)
    return server


class Popen(ForkedPopen):
    """`subprocess.Popen` of `engine` or of a script in Python."""

    def is_forked(self, args: Any, env: Any) -> bool:
        if sys.platform != "linux":
            return False
        return fork_server().suits(dict(os.environ if env is None else env))

    def fork(self, order: dict[str, Any], files: list[int]) -> int:
        return fork_server().fork(order, files)


def run(
    command: list[str],
    *,
    timeout: float,
    env: dict[str, str] | None = None,
    popen: type[subprocess.Popen[Any]] = Popen,
) -> subprocess.CompletedProcess[str]:
    """`subprocess.run` with its output as text, forked unless `popen` is another one."""
    pipe = subprocess.PIPE
    with popen(command, env=env, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    return subprocess.CompletedProcess(command, process.returncode, stdout, stderr)
