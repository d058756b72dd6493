"""Commands that run a plugin's code do it in a process of their own, which it may end as it likes.

The command's process waits, with nothing of the plugin in it: whatever the plugin does to the
interpreter, the exit code and the last line are the command's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, TextIO

import typer

from mm_engine.errors import MMEngineError, StartupError
from mm_engine.plugins.blame import one_line
from mm_engine.plugins.printable import printable, to_json

Announce = Callable[[str], object]
Show = Callable[[TextIO], object]

SECONDS_TO_STOP = 2.0  # after Ctrl-C, for the terminal to be left as it was


def fail(message: str, *, as_json: bool, code: int = 1) -> NoReturn:
    """Say what keeps a command from its answer, on stderr and, if that was asked for, as JSON."""
    line = " ".join(message.split())
    typer.echo(f"error: {printable(line)}", err=True)
    if as_json:
        typer.echo(to_json({"error": line}))
    raise typer.Exit(code)


def contained(
    work: Callable[[Announce], tuple[int, Show]], plugin: str, *, as_json: bool, refused: int = 1
) -> NoReturn:
    """Run `work` in a new process and end the command with its exit code.

    `work` is given a function to be told what is being done, which the error says if the plugin
    (`plugin`, until a line `plugin: …` names it better) ends the process. It returns the exit code
    and a function that writes the answer: all else that is written to stdout goes to stderr.
    `refused` is the exit code after a `StartupError`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(read)
        _answer(work, write, as_json=as_json, refused=refused)
    os.close(write)
    status = _wait(pid)
    os.set_blocking(read, False)
    try:
        told = os.read(read, 2**16).decode(errors="replace").splitlines()
    except BlockingIOError:  # something that the plugin started holds the other end
        told = []
    if told and told[-1].startswith("code: "):
        raise typer.Exit(int(told[-1].removeprefix("code: ")))
    during = ""
    for line in told:
        kind, _, value = line.partition(": ")
        plugin, during = (value, during) if kind == "plugin" else (plugin, f" {line}")
    how = f"with exit code {os.waitstatus_to_exitcode(status)}"
    if os.WIFSIGNALED(status):
        how = f"by {signal.Signals(os.WTERMSIG(status)).name}"
    message = f"the plugin {plugin} ended the interpreter {how}{during}. Repair it."
    fail(message, as_json=as_json)


def _wait(pid: int) -> int:
    """Wait for the process; whoever stops the command stops it, too."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise typer.Exit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return os.waitpid(pid, 0)[1]
    except KeyboardInterrupt:
        with contextlib.suppress(KeyboardInterrupt):  # the second one is meant for us
            os.kill(pid, signal.SIGINT)
            deadline = time.monotonic() + SECONDS_TO_STOP
            while time.monotonic() < deadline and os.waitpid(pid, os.WNOHANG) == (0, 0):
                time.sleep(0.02)
        raise typer.Exit(130) from None
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        signal.signal(signal.SIGTERM, before)


def _answer(
    work: Callable[[Announce], tuple[int, Show]], write: int, *, as_json: bool, refused: int
) -> NoReturn:
    """Do the work in the new process, and end it at once: calls given up on may still run."""
    own = os.getpid()

    def tell(line: str) -> None:
        if os.getpid() == own:
            os.write(write, f"{' '.join(line.split())}\n".encode(errors="replace"))

    code = 1
    try:
        out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        code, show = _outcome(lambda: work(tell), as_json=as_json, refused=refused)
        if os.getpid() == own:  # not the other half of a plugin that forked
            with contextlib.suppress(BrokenPipeError):
                show(out)
                out.flush()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError, AttributeError):  # a plugin closed it
                stream.flush()
        tell(f"code: {code}")
    finally:
        os._exit(code)


def _outcome(
    work: Callable[[], tuple[int, Show]], *, as_json: bool, refused: int
) -> tuple[int, Show]:
    try:
        return work()
    except KeyboardInterrupt:
        return 130, lambda out: None
    except MMEngineError as error:
        code = refused if isinstance(error, StartupError) else 1
        line = " ".join(str(error).split())
        sys.stderr.write(f"error: {printable(line)}\n")
    except BaseException as error:  # of a plugin, or a bug of ours: one can tell by the traceback
        code, line = 1, one_line(error)
        traceback.print_exc()
    return code, lambda out: out.write(to_json({"error": line}) + "\n") if as_json else None
