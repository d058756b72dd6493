"""`engine serve` with a demo, as an operator starts it, and what its processes hold."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import psutil

from mm_engine.errors import StartupError

ENGINE = Path(sys.executable).with_name("engine")
START_SECONDS = 120.0
END_SECONDS = 45.0  # after SIGTERM; then it is killed
_ADDRESS = re.compile(r"address +(http://\S+?)/v1")
_GAUGE = re.compile(r"^mm_engine_(\w+) (\S+)$", re.MULTILINE)
#: What has to be 0 when nobody is being answered.
HELD_FOR_REQUESTS = (
    "num_requests_running",
    "num_requests_waiting",
    "num_requests_in_flight",
    "num_used_blocks",
)
TASKS = "num_tasks"  # of the server's event loop
#: What caches keep, and what bounds it.
KEPT = {"num_kept_blocks": "num_blocks", "encoder_rows": "max_encoder_rows"}


@dataclass(frozen=True, slots=True)
class Held:
    """What one process of the server holds."""

    rss: int  # bytes
    num_fds: int
    num_threads: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the whole server holds."""

    processes: dict[str, Held]  # by what they do: "front", "engine", "grammars"
    gauges: dict[str, float]  # by the metric's name, without `mm_engine_`

    def to_json(self) -> dict[str, Any]:
        """For a record."""
        return asdict(self)


class Server:
    """A server on a free port of 127.0.0.1: ready inside `with`, ended after it.

    `folder` takes its log, and its temporary files under `tmp`. `program` is what is called with
    `serve` and the flags.

    Raises:
        StartupError: it doesn't start; the message has the end of what it printed.
    """

    def __init__(self, folder: Path, *flags: str, program: Sequence[str] = (str(ENGINE),)) -> None:
        self.flags = flags
        self.program = program
        self.log = folder / "log"
        self.tmp = folder / "tmp"
        self.url = ""
        self.start_seconds = 0.0  # from its launch until /ready answered 200

    def __enter__(self) -> Server:
        self.tmp.mkdir(parents=True)
        command = [*self.program, "serve", "--port", "0", *self.flags]
        start = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": str(self.tmp)},
                start_new_session=True,  # Ctrl-C is this process's affair
            )
        try:
            wait_until(self._has_address, "its address", START_SECONDS)
            self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
            wait_until(self.is_ready, "/ready to answer 200", START_SECONDS)
        except BaseException:
            self._kill()
            raise
        self.start_seconds = time.monotonic() - start
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(END_SECONDS)
        self._kill()

    def _has_address(self) -> bool:
        printed = self.log.read_text("utf-8", "replace")
        if self.process.poll() is not None:
            raise StartupError(
                f"the server ended while starting: exit status {self.process.returncode}. "
                f"It printed last: {printed[-500:]}"
            )
        found = _ADDRESS.search(printed)
        self.url = found[1] if found else ""
        return bool(found)

    def is_ready(self) -> bool:
        """Whether /ready answers 200.

        Raises:
            RuntimeError: nothing will answer any more.
        """
        if self.process.poll() is not None:
            raise RuntimeError(f"the server has ended: exit status {self.process.returncode}.")
        try:
            return self.http.get("/ready").status_code == httpx.codes.OK
        except httpx.HTTPError:
            return False

    def processes(self) -> dict[str, psutil.Process]:
        """Its processes by what they do; any that isn't known under its number."""
        front = psutil.Process(self.process.pid)
        found = {"front": front}
        for child in front.children(recursive=True):
            found[_name_of(child)] = child
        return found

    def gauges(self) -> dict[str, float]:
        """The metrics without labels."""
        text = self.http.get("/metrics").text
        return {name: float(value) for name, value in _GAUGE.findall(text)}

    def is_idle(self) -> bool:
        """Whether the engine holds nothing for anybody."""
        gauges = self.gauges()
        return not any(gauges[name] for name in HELD_FOR_REQUESTS)

    def snapshot(self) -> Snapshot:
        """What it holds now."""
        held = {
            name: Held(process.memory_info().rss, process.num_fds(), process.num_threads())
            for name, process in self.processes().items()
        }
        names = (*HELD_FOR_REQUESTS, *KEPT, *KEPT.values(), TASKS)
        gauges = self.gauges()
        return Snapshot(held, {name: gauges[name] for name in names})

    def cpu_seconds(self) -> dict[str, float]:
        """Processor time that its processes have taken so far."""
        times = {name: process.cpu_times() for name, process in self.processes().items()}
        return {name: time.user + time.system for name, time in times.items()}

    def leftovers(self, known: list[psutil.Process]) -> list[str]:
        """Of these processes those that still live, and temporary files."""
        alive = [f"process {process.pid}" for process in known if is_alive(process)]
        return alive + [str(path.relative_to(self.tmp)) for path in self.tmp.rglob("*")]

    def _kill(self) -> None:
        try:
            front = psutil.Process(self.process.pid)
            processes = [front, *front.children(recursive=True)]
        except psutil.NoSuchProcess:
            processes = []
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self.process.wait()


def _name_of(process: psutil.Process) -> str:
    try:
        command = " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        command = ""
    if "mm_engine.engine.process" in command:
        return "engine"
    return "grammars" if "grammar_process" in command else f"process {process.pid}"


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; one that has ended and wasn't waited for doesn't."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(ready: Callable[[], bool], what: str, seconds: float) -> float:
    """Poll until it is so; returns how many seconds that took.

    Raises:
        StartupError: it isn't in time.
    """
    start = time.monotonic()
    while not ready():
        if time.monotonic() - start > seconds:
            raise StartupError(f"the server isn't so far after {seconds:g} s: waited for {what}.")
        time.sleep(0.02)
    return time.monotonic() - start
