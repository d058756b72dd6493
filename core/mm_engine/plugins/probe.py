"""Importing plugins where they can't hurt: each in a process of its own, under a time limit.

One process imports what most plugins need (torch, above all) and forks for each of them. A plugin
that hangs, ends the interpreter or writes to the terminal takes only its own fork with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mm_engine.errors import MMEngineError, PluginError, StartupError
from mm_engine.plugins.blame import one_line
from mm_engine.plugins.record import PluginRecord

MAX_AT_ONCE = 4  # plugins that are imported side by side
PLACE = re.compile(r"\(([^()]+\.py):(\d+)\)")  # as blame.place_of writes it

#: What every fork then has, instead of importing it for itself.
IMPORTED_ONCE = (
    "transformers.models.auto.modeling_auto",
    "mm_engine.plugins.discovery",
    "mm_engine.plugins.plugin",
)

#: The same import path as here, whatever made it; `-P` keeps the current folder out until then.
BOOT = (
    "import json, sys; order = json.load(sys.stdin); sys.path[:] = order['path']\n"
    "from mm_engine.plugins.tolerance import pass_over_damage; pass_over_damage()\n"
    "from mm_engine.plugins.probe import serve; serve(order)"
)


@dataclass(frozen=True, slots=True)
class ProbeResult:
    """What came of importing one plugin."""

    state: Literal["ok", "hooks", "import", "hung", "died"]
    message: str = ""  # what is wrong, with the plugin's name
    hooks: tuple[str, ...] = ()
    missing_module: str | None = None  # what a ModuleNotFoundError was about
    file: str | None = None  # where the author has to look
    line: int | None = None


def probe(records: Sequence[PluginRecord], seconds: float) -> list[ProbeResult]:
    """Import each plugin and check its hooks; one that takes longer than `seconds` is given up.

    Raises:
        StartupError: mm-engine itself can't be imported in a new process.
    """
    if not records:
        return []
    order = {
        "path": [entry for entry in sys.path if isinstance(entry, str)],
        "seconds": seconds,
        "records": [dataclasses.asdict(record) for record in records],
    }
    flags = ["-P", *(["-S"] if sys.flags.no_site else [])]
    process = subprocess.Popen(
        [sys.executable, *flags, "-c", BOOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    with process:
        try:
            answer, errors = process.communicate(json.dumps(order).encode())
        except BaseException:
            process.terminate()  # it ends its forks, too
            raise
    if process.returncode != 0:
        last = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise StartupError(
            f"mm-engine can't be imported in a new process: {last or process.returncode}. "
            "Run: pip install --force-reinstall mm-engine"
        )
    return [_result(given) for given in json.loads(answer)]


def _result(given: dict[str, Any]) -> ProbeResult:
    return ProbeResult(**{**given, "hooks": tuple(given["hooks"])})


@dataclass(slots=True)
class _Fork:
    index: int
    pid: int
    answer: int  # the end of the pipe that is read
    deadline: float
    received: bytes = b""


def serve(order: dict[str, Any]) -> None:
    """Run in the new process: probe what `order` names and write the results to stdout as JSON."""
    for name in IMPORTED_ONCE:
        importlib.import_module(name)

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    records = [PluginRecord(**record) for record in order["records"]]
    results: dict[int, dict[str, Any]] = {}
    running: list[_Fork] = []
    waiting = list(range(len(records)))
    try:
        while waiting or running:
            while waiting and len(running) < MAX_AT_ONCE:
                index = waiting.pop(0)
                running.append(_fork(index, records[index], order["seconds"]))
            _wait(running)
            for fork in list(running):
                if b"\n" not in fork.received and time.monotonic() < fork.deadline:
                    continue  # it runs
                running.remove(fork)
                result = _outcome(fork, records[fork.index], order["seconds"])
                results[fork.index] = dataclasses.asdict(result)
    finally:
        for fork in running:
            _end(fork)
    sys.stdout.write(json.dumps([results[index] for index in range(len(records))]))


def _fork(index: int, record: PluginRecord, seconds: float) -> _Fork:
    sys.stdout.flush()
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return _Fork(index, pid, read, time.monotonic() + seconds)
    try:
        os.setsid()  # so that what a plugin starts can be ended with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(nowhere, stream)
        own = os.getpid()
        answer = json.dumps(dataclasses.asdict(import_one(record)))
        if os.getpid() == own:  # a plugin may have forked: one of the two answers
            os.write(write, answer.encode() + b"\n")
    finally:
        os._exit(0)


def _wait(running: Sequence[_Fork]) -> None:
    left = min(fork.deadline for fork in running) - time.monotonic()
    ready, _, _ = select.select([fork.answer for fork in running], [], [], max(0.0, left))
    for fork in running:
        if fork.answer in ready:
            received = os.read(fork.answer, 2**16)
            fork.received += received
            if not received:
                fork.received += b"\n"  # the end, with an answer or without


def _outcome(fork: _Fork, record: PluginRecord, seconds: float) -> ProbeResult:
    """What came of it, when it has answered, has ended, or has had its time."""
    status = _end(fork)
    answer, complete, _ = fork.received.partition(b"\n")
    with contextlib.suppress(ValueError, TypeError):  # what a plugin wrote is no answer
        return _result(json.loads(answer))
    what = f"the plugin {record.label} can't be imported: {record.module}"
    if not complete:
        return ProbeResult("hung", f"{what} takes longer than {seconds:g} s.")
    how = f"with exit code {os.waitstatus_to_exitcode(status)}"
    if os.WIFSIGNALED(status):
        how = f"by {signal.Signals(os.WTERMSIG(status)).name}"
    return ProbeResult("died", f"{what} ended the interpreter {how}.")


def _end(fork: _Fork) -> int:
    """End a fork and what it has started; returns its wait status."""
    os.close(fork.answer)
    patience = time.monotonic() + (1.0 if fork.received else 0.0)  # it is about to exit by itself
    pid, status = os.waitpid(fork.pid, os.WNOHANG)
    while not pid and time.monotonic() < patience:
        time.sleep(0.005)
        pid, status = os.waitpid(fork.pid, os.WNOHANG)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(fork.pid, signal.SIGKILL)
    if not pid:
        os.kill(fork.pid, signal.SIGKILL)  # it may not have got as far as its own group
        _, status = os.waitpid(fork.pid, 0)
    return status


def import_one(record: PluginRecord) -> ProbeResult:
    """Import one plugin in this process and check its hooks."""
    from mm_engine.plugins.discovery import load

    try:
        return ProbeResult("ok", hooks=load(record).hooks)
    except PluginError as error:
        place = PLACE.search(str(error))
        if place is None:
            return ProbeResult("hooks", str(error), file=_file_of(record.module))
        return ProbeResult("hooks", str(error), file=_absolute(place[1]), line=int(place[2]))
    except MMEngineError as error:
        cause = error.__cause__
        missing = cause.name if isinstance(cause, ModuleNotFoundError) else None
        file, line = _place(cause, record.module) if cause is not None else (None, None)
        return ProbeResult("import", str(error), missing_module=missing, file=file, line=line)
    except BaseException as error:  # of the import system, or KeyboardInterrupt by the plugin
        what = f"the plugin {record.label} can't be imported: {record.module}"
        return ProbeResult("import", f"{what} raised {one_line(error)}.")


def _place(error: BaseException, module: str) -> tuple[str | None, int | None]:
    """The last line of the plugin's own package that an error came through."""
    if isinstance(error, SyntaxError) and error.filename:
        return error.filename, error.lineno
    package = module.partition(".")[0]
    place: tuple[str | None, int | None] = (None, None)
    for frame, line in traceback.walk_tb(error.__traceback__):
        name = str(frame.f_globals.get("__name__", ""))
        if name.partition(".")[0] == package:
            place = (frame.f_code.co_filename, line)
    return place


def _file_of(module: str) -> str | None:
    return getattr(sys.modules.get(module), "__file__", None)


def _absolute(packaged: str) -> str | None:
    """The file that a message names from the folder of its top-level package."""
    for folder in sys.path:
        if os.path.isfile(os.path.join(folder, packaged)):
            return os.path.join(folder, packaged)
    return None
