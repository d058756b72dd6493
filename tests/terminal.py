"""A program in a terminal of its own, for tests of what one who types there sees."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

CTRL_C, CTRL_D, TAB = "\x03", "\x04", "\t"
#: Takes stdin for its terminal, so that Ctrl-C there is a signal, and becomes the program.
ATTACHED = (
    "import fcntl, os, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    "os.execv(sys.argv[1], sys.argv[1:])"
)
STYLES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")  # colours, and readline's modes


class Terminal:
    """Runs `command`; killed with all that it started on leaving."""

    def __init__(self, command: Sequence[str], env: dict[str, str]) -> None:
        self._master, slave = os.openpty()
        termios.tcsetwinsize(slave, (50, 400))
        self.raw = ""
        self._read = 0  # how much of `text` was expected before
        self.process: subprocess.Popen[Any] = subprocess.Popen(
            [sys.executable, "-c", ATTACHED, *command],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env={**env, "TERM": "xterm"},
            start_new_session=True,
        )
        os.close(slave)

    @property
    def text(self) -> str:
        """All that was shown, without styles."""
        return STYLES.sub("", self.raw).replace("\r\n", "\n")

    def type(self, keys: str) -> None:
        """Press `keys`."""
        os.write(self._master, keys.encode())

    def expect(self, pattern: str, seconds: float = 60.0) -> str:
        """Wait until `pattern` has been shown after what was expected before; returns it."""
        deadline = time.monotonic() + seconds
        while (found := re.compile(pattern).search(self.text, self._read)) is None:
            if not self._hear(deadline - time.monotonic()):
                raise AssertionError(f"not shown: {pattern!r}, but\n{self.text}")
        self._read = found.end()
        return found[0]

    def end(self, seconds: float = 30.0) -> int:
        """Wait until the program ends by itself; returns its exit code."""
        deadline = time.monotonic() + seconds
        while self._hear(deadline - time.monotonic()):
            pass
        return self.process.wait(max(deadline - time.monotonic(), 1.0))

    def _hear(self, seconds: float) -> bool:
        """Read what is shown next; False when nothing more comes."""
        if seconds <= 0 or not select.select([self._master], [], [], seconds)[0]:
            return False
        try:
            shown = os.read(self._master, 2**16)
        except OSError:  # Linux's way to say that nobody is at the other end
            return False
        self.raw += shown.decode("utf-8", "replace")
        return bool(shown)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._master)
