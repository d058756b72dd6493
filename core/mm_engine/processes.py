"""Processes of our own: how one is started, how it ends with its parent, how it ended."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

MAX_ADDRESS = 100  # bytes; the system's limit for a socket's path is 104 to 108


def private_folder(longest_name: str) -> Path:
    """A fresh folder that only this user can enter, in which a socket of that name can be."""
    folder = Path(tempfile.mkdtemp(prefix="mm-engine-"))
    if len(os.fsencode(folder / longest_name)) > MAX_ADDRESS:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="mm-engine-", dir="/tmp"))
    return folder


def spawn(module: str, *arguments: object, pass_fds: Collection[int] = ()) -> subprocess.Popen[Any]:
    """Run `python -m module arguments…`: a fresh interpreter, so that the program that starts it
    needs no `if __name__ == "__main__"`.

    What the parent can import the child can too, and nothing else: not the current folder's. What
    a plugin prints there goes to stderr: the program's stdout is its own.
    """
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        stdin=subprocess.DEVNULL,
        stdout=2,
        pass_fds=pass_fds,
        env={**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"},
    )


def leave_signals_to_parent() -> None:
    """Ctrl-C and a service manager's SIGTERM reach the whole group: the parent, who has work to
    finish first, says when to go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def end_with_parent(parent_pid: int, folder: Path | None = None) -> None:
    """From now on watch the parent; if it dies without a word, end and leave no folder behind."""
    threading.Thread(target=_watch_parent, args=(parent_pid, folder), daemon=True).start()


def _watch_parent(parent_pid: int, folder: Path | None) -> None:
    while os.getppid() == parent_pid:
        time.sleep(1)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def how_it_ended(process: subprocess.Popen[Any]) -> str:
    """In words: `killed by SIGKILL`, `exit status 1`."""
    code = process.poll() or 0
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"
