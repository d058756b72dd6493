"""The process that `forking` forks others from: it has imported third parties, and nothing of ours.

Run as a script, with a socket's file descriptor. An order is a packet of JSON with three files:
`args`, `cwd`, `env` and `session`; the answer is a process id.
What is forked runs `args` as a new interpreter would. It ends as one does, but for taking all
modules apart, which takes longer than the rest.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import importlib
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import types
from typing import Any

HEAVY = (
    *("torch", "transformers", "numpy", "PIL.Image", "safetensors.torch", "fastapi", "uvicorn"),
    *("zmq", "zmq.asyncio", "msgspec", "pluggy", "jinja2", "typer", "rich.progress", "httpx"),
    *("prometheus_client", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "transformers.modeling_layers"),
    *("transformers.models.auto.image_processing_auto", "transformers.masking_utils"),
    *("transformers.models.clip.modeling_clip", "transformers.models.llama.configuration_llama"),
)
LARGEST = 2**18  # bytes of an order
PARENT_DEATH, SUBREAPER = 1, 36  # of prctl


def prctl(option: int, value: int) -> None:
    """Linux's call, which Python lacks."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "prctl")


def receive(link: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """The next order and its files; None when the other end is closed."""
    packet, files, _, _ = socket.recv_fds(link, LARGEST, 3)
    return (json.loads(packet), files) if packet else None


def serve(link: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork what is ordered; returns in what is forked only.

    It is no child of this process: its parent ends, and the one who ordered it adopts it.
    """
    while (received := receive(link)) is not None:
        read, write = os.pipe()
        between = os.fork()
        if not between:
            pid = os.fork()
            if pid:
                os.write(write, str(pid).encode())
                os._exit(0)
            os.close(read)
            os.close(write)
            return received
        os.waitpid(between, 0)
        os.close(write)
        link.send(os.read(read, 64))
        os.close(read)
        for file in received[1]:
            os.close(file)
    os._exit(0)


def with_spare(order: dict[str, Any], files: list[int]) -> tuple[dict[str, Any], list[int]]:
    """Fork a process that becomes the first interpreter which this one starts, while it is fresh.

    Returns twice: with what this process is to run, and maybe with what the other one is.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    parent = os.getpid()
    pid = os.fork()
    if not pid:
        ours.close()
        prctl(PARENT_DEATH, signal.SIGKILL)
        received = receive(theirs) if os.getppid() == parent else None
        if received is None:
            os._exit(0)
        prctl(PARENT_DEATH, 0)
        for file in files:
            os.close(file)
        theirs.close()
        return received
    theirs.close()

    class Popen(ForkedPopen):
        """Of the interpreter that this process starts first; any other is a real one."""

        def is_forked(self, args: Any, env: Any) -> bool:
            is_python = isinstance(args, list) and args[:1] == [sys.executable]
            return is_python and ours.fileno() != -1

        def fork(self, order: dict[str, Any], files: list[int]) -> int:
            socket.send_fds(ours, [json.dumps(order).encode()], files)
            ours.close()
            return pid

    subprocess.Popen = Popen  # type: ignore[misc]
    return order, files


class ForkedPopen(subprocess.Popen):  # type: ignore[type-arg]
    """A `subprocess.Popen` that has its process forked, where that is possible."""

    def is_forked(self, args: Any, env: Any) -> bool:
        """Whether this one can be."""
        raise NotImplementedError

    def fork(self, order: dict[str, Any], files: list[int]) -> int:
        """Have it forked, as a child of this process."""
        raise NotImplementedError

    def _execute_child(self, *given: Any) -> None:
        start: Any = super()._execute_child  # type: ignore[misc]
        named = inspect.signature(start).bind(*given).arguments
        if not self.is_forked(named["args"], named["env"]):
            start(*given)
            return
        files = [named["p2cread"], named["c2pwrite"], named["errwrite"]]
        order = {
            "args": list(map(os.fspath, named["args"])),
            "cwd": named["cwd"] and os.fspath(named["cwd"]),
            "env": dict(os.environ if named["env"] is None else named["env"]),
            "session": named["start_new_session"],
        }
        used = [number if file == -1 else file for number, file in enumerate(files)]
        self.pid = self.fork(order, used)
        this: Any = self
        this._child_created = True
        ends = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        this._close_pipe_fds(*(named[name] for name in ends))


def become(order: dict[str, Any], files: list[int], base: list[str]) -> None:
    """Take the files, environment and import path of a new interpreter; `base` is that of all."""
    for number, file in enumerate(files):
        os.dup2(file, number)
    for file in files:
        os.close(file)
    os.environ.clear()
    os.environ.update(order["env"])
    if order["cwd"]:
        os.chdir(order["cwd"])
    if order["session"]:
        os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    tempfile.tempdir = None
    given = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[:] = dict.fromkeys([*(os.path.abspath(entry) for entry in given if entry), *base])
    sys.path_importer_cache.clear()
    importlib.invalidate_caches()


def run(args: list[str]) -> None:
    """What the command line `args` says."""
    if args[0] == sys.executable:
        args = args[1:]
        while args[0] in ("-P", "-u"):
            args = args[1:]
        if args[0] == "-m":
            sys.argv = args[1:]
            runpy.run_module(args[1], run_name="__main__", alter_sys=True)
            return
        if args[0] == "-c":
            sys.argv = ["-c", *args[2:]]
            main = sys.modules["__main__"] = types.ModuleType("__main__")
            exec(compile(args[1], "<string>", "exec"), main.__dict__)
            return
    sys.argv = args
    sys.path.insert(0, os.path.dirname(args[0]))
    runpy.run_path(args[0], run_name="__main__")


def run_to_the_end(args: list[str]) -> None:
    """Run, wait for threads, call what is registered for the end, and exit."""
    code: Any = None
    try:
        run(args)
    except SystemExit as error:
        code = error.code
    if not isinstance(code, int | None):
        sys.stderr.write(f"{code}\n")
        code = 1
    this: Any = threading
    this._shutdown()
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit((code or 0) & 255)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's; whoever ordered it says when to go
    del sys.path[0]  # the tests'
    everywhere = list(sys.path)
    for heavy in HEAVY:
        importlib.import_module(heavy)
    assert threading.active_count() == len(os.listdir("/proc/self/task")) == 1
    gc.collect()
    gc.freeze()
    listening = socket.socket(fileno=int(sys.argv[1]))
    listening.send(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})).encode())
    ordered, opened = serve(listening)
    listening.close()
    ordered, opened = with_spare(ordered, opened)
    become(ordered, opened, everywhere)
    run_to_the_end(ordered["args"])
