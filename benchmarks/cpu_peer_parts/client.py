"""An engine in a process of its own, and speaking to it within limits."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

DRIVERS = Path(__file__).parent / "drivers"
MAX_REASON = 400  # characters


class PeerError(Exception):
    """An engine didn't do what was asked; the text is the reason that is recorded."""


class Peer:
    """A driver script that runs under an engine's python. It ends with this object's `close`."""

    def __init__(
        self, python: str, script: str | Path, environment: Mapping[str, str], log: Path
    ) -> None:
        """Start it. What it prints besides answers goes to the end of the file `log`.

        Raises:
            PeerError: there is no such python.
        """
        self.log = log
        self.start = time.perf_counter()
        self._rest = b""
        try:
            with log.open("ab") as errors:
                self._process = subprocess.Popen(
                    [python, str(DRIVERS / script)],
                    env=dict(environment),
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=errors,
                    bufsize=0,
                    start_new_session=True,  # to end it with all that it has started
                )
        except OSError as error:
            raise PeerError(f"{python} can't be run: {error.strerror}") from None

    @property
    def alive(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, do: str, limit: float, **arguments: Any) -> dict[str, Any]:
        """Give an order and wait for its answer, at most `limit` seconds.

        Raises:
            PeerError: it says that it failed, it has ended, or it took too long and was ended.
        """
        order = json.dumps({"do": do, **arguments}) + "\n"
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(order.encode())
            line = self._line(time.monotonic() + limit)
        except BrokenPipeError:
            line = b""
        except TimeoutError:
            self.close()
            raise PeerError(f"{do}: no answer within {limit:.0f} s") from None
        if not line:
            code = self._process.wait()
            raise PeerError(f"{do}: its process ended with exit status {code}: {self._last()}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(f"{do}: {answer['error']}")
        return answer

    def _line(self, deadline: float) -> bytes:
        """The next line that it writes; nothing if it has ended."""
        assert self._process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            while b"\n" not in self._rest:
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimeoutError
                read = os.read(self._process.stdout.fileno(), 1 << 16)
                if not read:
                    return b""
                self._rest += read
        line, _, self._rest = self._rest.partition(b"\n")
        return line

    def _last(self) -> str:
        """The last line of its log."""
        lines = self.log.read_text("utf-8", "replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")[:MAX_REASON]

    def resident_bytes(self) -> int:
        """Memory of it and all that it has started. What several share counts once, on Linux."""
        total = 0
        for process in self._processes():
            try:
                full = process.memory_full_info()
            except psutil.Error:  # it has just ended
                continue
            total += getattr(full, "pss", full.rss)
        return total

    def pause(self) -> None:
        """Take no more of the machine's time, until it is asked again."""
        self._each(psutil.Process.suspend)

    def resume(self) -> None:
        """Go on."""
        self._each(psutil.Process.resume)

    def _each(self, do: Callable[[psutil.Process], None]) -> None:
        with contextlib.suppress(psutil.Error):  # all has ended
            for process in self._processes():
                with contextlib.suppress(psutil.Error):  # it has just ended
                    do(process)

    def _processes(self) -> list[psutil.Process]:
        """It, and all that it has started."""
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    def close(self) -> None:
        """End it and all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()
