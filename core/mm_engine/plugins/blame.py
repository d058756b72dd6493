"""Whose fault it was, in one line: distribution, version, hook, place, and what went wrong."""

from __future__ import annotations

import functools
import inspect
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from mm_engine.errors import PluginError

T = TypeVar("T")

MAX_CAUSE_LENGTH = 300  # characters of a foreign exception's message that ours repeats
MAX_LATE = 1.0  # seconds after the limit in which an answer still counts: a busy machine
MAX_HANGING_CALLS = 32  # given up on and still running; each holds a thread

_hanging: set[threading.Thread] = set()
_hanging_lock = threading.Lock()


def with_time_limit(call: Callable[[], T], seconds: float | None, what: str) -> T:
    """Return `call()`, or give up on it after `seconds` (None: never).

    A call that hangs can't be stopped: its daemon thread stays, but whoever waited goes on. When
    `MAX_HANGING_CALLS` threads have stayed, no more calls are made until one of them ends.

    Raises:
        PluginError: the limit passed, or too many calls hang; the message starts with `what`.
    """
    if seconds is None:
        return call()
    if no_more_calls():
        fact = f"not called, as {MAX_HANGING_CALLS} calls before it were given up on and still run"
        raise PluginError(f"{what}: {fact}. Restart the server.")
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(call())
        except BaseException as error:  # raised again below, in the caller's thread
            failure.append(error)

    thread = threading.Thread(target=run, name=f"hook: {what}", daemon=True)
    start = time.monotonic()
    thread.start()
    thread.join(seconds)
    if failure:
        raise failure[0]
    # One that never lets go of the interpreter keeps this thread from waking in time.
    late = time.monotonic() - start > seconds + MAX_LATE
    if not outcome or late:
        if thread.is_alive():
            with _hanging_lock:
                _hanging.add(thread)
        raise PluginError(f"{what}: took longer than {seconds:g} s.")
    return outcome[0]


def no_more_calls() -> bool:
    """Whether so many calls hang that no others are made: the process should be restarted."""
    return num_hanging_calls() >= MAX_HANGING_CALLS


def num_hanging_calls() -> int:
    """Return how many calls were given up on and still run."""
    with _hanging_lock:
        _hanging.difference_update([thread for thread in _hanging if not thread.is_alive()])
        return len(_hanging)


def may_be_the_users(error: BaseException) -> bool:
    """Whether the exception may be the user's Ctrl-C, which is nobody's fault and must go on.

    Python raises that one in the main thread, unless the process ignores the signal.
    """
    return (
        isinstance(error, KeyboardInterrupt)
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN
    )


def one_line(error: BaseException) -> str:
    """Return `Type: message`, on one line and shortened."""
    try:
        message = " ".join(str(error).split())
    except Exception:  # its own __str__ fails
        return type(error).__name__
    # A terminal or an encoder must not choke on what a plugin says.
    message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
    if len(message) > MAX_CAUSE_LENGTH:
        message = message[: MAX_CAUSE_LENGTH - 1] + "…"
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def kind_of(value: object) -> str:
    """Return what `value` is, for a message: `str`, `-3`, `Tensor (float32, [3, 336, 336])`."""
    dtype, shape = getattr(value, "dtype", None), getattr(value, "shape", None)
    if dtype is not None and shape is not None:
        return f"{type(value).__name__} ({str(dtype).removeprefix('torch.')}, {list(shape)})"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__qualname__}"
    return type(value).__name__


def place_of(function: object, error: BaseException | None = None) -> str:
    """Return where `function` is written: `mm_foo/plugin.py:42`.

    With an `error` that passed through the function's file, the line is the last one there that
    it passed. A callable without source of its own (a partial, an object) is named instead.
    """
    while isinstance(function, functools.partial):
        function = function.func
    if inspect.ismethod(function) or inspect.isfunction(function):
        function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None:
        function = function if isinstance(function, type) else type(function)
        return f"{function.__module__}.{function.__qualname__}"
    line = code.co_firstlineno
    step = error.__traceback__ if error is not None else None
    while step is not None:
        if step.tb_frame.f_code.co_filename == code.co_filename:
            line = step.tb_lineno
        step = step.tb_next
    return f"{_packaged(Path(code.co_filename), getattr(function, '__module__', ''))}:{line}"


def _packaged(path: Path, module: Any) -> str:
    """Return the file as seen from the folder that its top-level package lies in."""
    depth = str(module or "").count(".") + 1 + (path.name == "__init__.py")
    return "/".join(path.parts[-depth:])
