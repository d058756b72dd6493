"""The front's end of the process that compiles grammars."""

from __future__ import annotations

import hashlib
import logging
import os
import subprocess
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, Pipe
from typing import Any

import msgspec

from mm_engine.errors import Overloaded, RequestError
from mm_engine.inputs.grammar_process import Compiled
from mm_engine.processes import how_it_ended, spawn
from mm_engine.sampling_params import StructuredOutputsParams
from mm_engine.worker.grammars import PARAM, Grammars

logger = logging.getLogger(__name__)

PROCESS = "mm_engine.inputs.grammar_process"
START_SECONDS = 60.0  # for the process to import what it needs
POLL_SECONDS = 0.05  # how often it is looked whether the client has left
MAX_WAITING = 16  # grammars; more are refused for now
MAX_KEPT_BYTES = 64 * 2**20  # of compiled grammars
_ENTRY_BYTES = 2**10  # that an entry takes besides


class GrammarCompiler:
    """Compiles grammars in a process of its own, one after the other, each within `timeout` s.

    The process is started for the first one, and again after one that ended it. What came of a
    grammar is kept, a refusal too, for the client who brought it: others don't learn by its speed
    that it was there. Threads may share it.
    """

    def __init__(self, grammars: Grammars, timeout: float) -> None:
        self._grammars = grammars
        self._timeout = timeout
        self._turn = threading.Lock()  # of those who wait for the process
        self._lock = threading.Lock()  # around all below
        self._num_waiting = 0
        self._known: OrderedDict[bytes, Compiled] = OrderedDict()  # by client and source
        self._num_bytes = 0
        self._process: subprocess.Popen[Any] | None = None
        self._connection: Connection | None = None
        self._closed = False

    def compile(
        self,
        structure: StructuredOutputsParams,
        client: bytes | None = None,
        left: threading.Event | None = None,
    ) -> bytes:
        """What a request of this client carries. Blocks, until it has `left` at most.

        Raises:
            RequestError: it can't be compiled, or not in time, or there is no xgrammar.
            Overloaded: too many others wait.
        """
        source = msgspec.msgpack.encode(structure)
        key = hashlib.sha256((client or b"") + source).digest()
        left = left or threading.Event()
        known = self._recall(key)
        if known is None:
            with self._waiting(), self._having_turn(left):
                known = self._recall(key)  # perhaps it was the one before
                if known is None:
                    known = self._compile(source, left)
                    self._keep(key, known)
        if known.grammar is None:
            raise RequestError(known.why, param=PARAM)
        return known.grammar

    def close(self) -> None:
        """End the process; whoever waits for it gets an error."""
        with self._lock:
            self._closed = True
            if self._process is not None:
                self._process.kill()
                self._process.wait()

    @contextmanager
    def _waiting(self) -> Iterator[None]:
        with self._lock:
            if self._num_waiting >= MAX_WAITING:
                raise Overloaded(
                    "too many grammars are being compiled. Send the request again later.",
                    reason="grammars_full",
                )
            self._num_waiting += 1
        try:
            yield
        finally:
            with self._lock:
                self._num_waiting -= 1

    @contextmanager
    def _having_turn(self, left: threading.Event) -> Iterator[None]:
        while not self._turn.acquire(timeout=POLL_SECONDS):
            if left.is_set():
                raise _gone()
        try:
            yield
        finally:
            self._turn.release()

    def _recall(self, key: bytes) -> Compiled | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def _keep(self, key: bytes, compiled: Compiled) -> None:
        with self._lock:
            self._known[key] = compiled
            self._num_bytes += _size(compiled)
            while self._num_bytes > MAX_KEPT_BYTES:
                self._num_bytes -= _size(self._known.popitem(last=False)[1])

    def _compile(self, source: bytes, left: threading.Event) -> Compiled:
        if self._process is not None and self._process.poll() is not None:
            self._end()  # in idle time, by whatever cause
        connection = self._connection or self._start()
        deadline = time.monotonic() + self._timeout
        try:
            connection.send_bytes(source)
            while not connection.poll(POLL_SECONDS):
                if left.is_set() or time.monotonic() > deadline:
                    self._end()
                    if left.is_set():
                        raise _gone()
                    raise RequestError(  # not kept: the machine may have been at fault
                        f"the grammar takes longer than {self._timeout:g} s to compile. "
                        "Simplify it.",
                        param=PARAM,
                    )
            return msgspec.msgpack.decode(connection.recv_bytes(), type=Compiled)
        except (OSError, EOFError):
            self._end()
            raise RequestError(
                "the grammar can't be compiled: its compiler has ended. Simplify it.", param=PARAM
            ) from None

    def _start(self) -> Connection:
        """Start the process.

        Raises:
            RequestError: there is no xgrammar.
            Overloaded: it doesn't start.
        """
        vocabulary = self._grammars.vocabulary.serialize_json().encode()
        ours, its = Pipe()
        with self._lock:
            if self._closed:
                ours.close()
                its.close()
                raise Overloaded(
                    "the server is shutting down. Send the request again later.",
                    status=503,
                    reason="draining",
                )
            fd = its.fileno()
            self._process = spawn(PROCESS, fd, os.getpid(), pass_fds=[fd])
        its.close()
        self._connection = ours
        try:
            ours.send_bytes(vocabulary)
            if ours.poll(START_SECONDS) and ours.recv_bytes() == b"ready":
                return ours
        except (OSError, EOFError):
            pass
        self._end()
        raise Overloaded(
            "grammars can't be compiled now. Send the request again later.",
            status=503,
            reason="grammars_full",
        )

    def _end(self) -> None:
        if self._process is None or self._connection is None:
            return
        self._process.kill()
        self._process.wait()
        logger.warning(
            "the process that compiles grammars was ended: %s.", how_it_ended(self._process)
        )
        self._connection.close()
        self._connection = self._process = None


def _gone() -> RequestError:
    return RequestError("the request was given up while its grammar was compiled.", param=PARAM)


def _size(compiled: Compiled) -> int:
    return _ENTRY_BYTES + len(compiled.grammar or b"")
