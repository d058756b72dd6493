"""Rank 0's hold on the other ranks of a tensor-parallel model: start them, tell them, watch them.

Each rank is a process with a device and a part of the weights. Rank 0 is the engine's own: it
plans, encodes images, embeds, samples. The others compute what it tells them, and one that ends, or
fails where the others don't, ends the engine: a part of the model is gone.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import shutil
import subprocess
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import zmq

from mm_engine.config import EngineConfig
from mm_engine.errors import ERRORS_BY_NAME, EngineDead, StartupError
from mm_engine.log import format_in_use, told_of
from mm_engine.plugins.blame import may_be_the_users, one_line
from mm_engine.plugins.record import PluginRecord
from mm_engine.processes import how_it_ended, private_folder, spawn
from mm_engine.worker import rank_wire
from mm_engine.worker.rank_group import RankGroup

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.1  # how often the processes are looked at
GRACE_SECONDS = 10.0  # by which the ranks may be apart when they fail
WORD_SECONDS = 30.0  # after which the log says whom is waited for
QUIT_SECONDS = 3.0  # how long they may take to end when asked
BEGIN, EVENTS = "begin", "events"  # in the folder

Event = TypeVar("Event", bound=rank_wire.FromRank)


class Ranks:
    """The other ranks, 1 to `config.tensor_parallel_size` - 1. Ended by `close`, or with it."""

    def __init__(self, config: EngineConfig, plugin: PluginRecord) -> None:
        """Start the processes; they open the model while the caller goes on. See `wait`."""
        self._folder = private_folder("commands-00")
        self.store = self._folder / "store"
        self._context = zmq.Context()
        self._sockets: list[zmq.Socket[bytes]] = []
        events = self._context.socket(zmq.PULL)
        events.bind(f"ipc://{self._folder / EVENTS}")
        # In a file, since a message waits for who is to read it, and a rank may die before that.
        begin = rank_wire.Begin(config, plugin, str(self.store))
        (self._folder / BEGIN).write_bytes(rank_wire.encode(begin))
        self._num_sent = 1  # messages to each rank, the first one in the file
        self._watch = _Watch([], events)
        self._end = weakref.finalize(
            self, _end, self._watch, self._sockets, self._context, self._folder
        )
        self._watch.start()
        level = logging.getLogger("mm_engine").getEffectiveLevel()
        try:
            for rank in range(1, config.tensor_parallel_size):
                socket = self._context.socket(zmq.PAIR)
                self._sockets.append(socket)
                socket.set_hwm(0)
                socket.bind(f"ipc://{self._folder / f'commands-{rank}'}")
                process = spawn(
                    "mm_engine.worker.rank", self._folder, rank, os.getpid(), level, format_in_use()
                )
                self._watch.processes.append(process)
        except BaseException:  # the system has no process to give, say
            self._end()
            raise

    @property
    def pids(self) -> list[int]:
        """The processes, from rank 1 on."""
        return [process.pid for process in self._watch.processes]

    def join(self, group: RankGroup) -> None:
        """Note the group, which is let go of when a rank ends."""
        self._watch.group = group

    def send(self, message: rank_wire.ToRank) -> None:
        """Tell all ranks, who have said that they are there; never waits.

        Raises:
            EngineDead: one of them is gone.
        """
        self.check()
        frame = rank_wire.encode(message)
        for socket in self._sockets:
            socket.send(frame, copy=False)
        self._num_sent += 1

    def wait(self, kind: type[Event]) -> list[Event]:
        """What each rank says of this kind. While it waits long, it says so.

        Raises:
            StartupError, PluginError: one says that it failed, or has ended.
        """
        found: dict[int, Event] = {}
        next_word = time.monotonic() + WORD_SECONDS
        while len(found) < len(self._sockets):
            try:
                event = self._next_event(next_word)
            except TimeoutError:
                missing = sorted(set(range(1, len(self._sockets) + 1)) - found.keys())
                logger.warning("Waiting for tensor-parallel ranks %s (%s).", missing, kind.__name__)
                next_word = time.monotonic() + WORD_SECONDS
                continue
            except EngineDead:
                raise self.refusal() from None
            if isinstance(event, rank_wire.Failed):
                error = ERRORS_BY_NAME.get(event.name, StartupError)
                raise error(f"tensor-parallel rank {event.rank}: {event.message}")
            if isinstance(event, kind):
                found[event.rank] = event
        return [found[rank] for rank in sorted(found)]

    def refusal(self) -> StartupError:
        """What ended a rank, as an error of startup."""
        return StartupError(f"{self._watch.death} What it printed says more.")

    @contextmanager
    def together(self) -> Iterator[None]:
        """Compute a step with the ranks: what raises in here must have been raised in each.

        Then all go on with the next step, and the error is this one's. If not, the ranks have come
        apart. Whoever takes the step's result asks `check` then: a rank may fail or end after this.

        Raises:
            EngineDead: a rank is gone, or they have come apart.
        """
        number = self._num_sent  # of the message that tells the ranks of the step
        try:
            yield
        except BaseException as error:
            if may_be_the_users(error):  # who has no time to find out how far the others are
                self._watch.die("interrupted in the middle of a tensor-parallel step.")
                raise
            if not isinstance(error, EngineDead) and self._num_sent > number:
                self._settle(error, number)
            self.check()
            raise

    def check(self) -> None:
        """Raise `EngineDead` if a rank is gone."""
        if self._watch.death is not None:
            raise EngineDead(f"the engine has stopped: {self._watch.death} Start it again.")

    def close(self) -> None:
        """Ask the processes to end, wait a moment, kill."""
        self._end()

    def _settle(self, error: BaseException, number: int) -> None:
        """Wait until each rank has failed at message `number` as this one did, and go on."""
        assert self._watch.group is not None
        deadline = time.monotonic() + GRACE_SECONDS
        failed: set[int] = set()
        while len(failed) < len(self._sockets):
            try:
                event = self._next_event(deadline)
            except TimeoutError:
                logger.error("Rank 0 failed: %s", told_of(error))
                self._watch.die_of(0, type(error).__name__)
                return
            if isinstance(event, rank_wire.Failed):
                alike = event.num_calls == self._watch.group.num_calls
                if event.number != number or not alike:
                    self._watch.die_of(event.rank, event.name)
                    return
                failed.add(event.rank)
                self._watch.forgive(event)
        self.send(rank_wire.Resume())

    def _next_event(self, deadline: float = float("inf")) -> rank_wire.FromRank:
        while True:
            self.check()
            with contextlib.suppress(queue.Empty):
                return self._watch.events.get(timeout=POLL_SECONDS)
            if time.monotonic() > deadline:
                raise TimeoutError


class _Watch(threading.Thread):
    """Listens to the ranks and looks after their processes, while rank 0 may be stuck in a call."""

    def __init__(self, processes: list[subprocess.Popen[Any]], socket: zmq.Socket[bytes]) -> None:
        super().__init__(name="tensor-parallel ranks", daemon=True)
        self.processes = processes
        self.events: queue.SimpleQueue[rank_wire.FromRank] = queue.SimpleQueue()
        self.group: RankGroup | None = None
        self.death: str | None = None  # what ended the first of them
        self.stopping = False
        self._socket = socket
        self._lock = threading.Lock()
        #: When which failures were told that rank 0 hasn't shared yet.
        self._failed: dict[rank_wire.Failed, float] = {}

    def forgive(self, event: rank_wire.Failed) -> None:
        """Rank 0 has failed at the same place."""
        with self._lock:
            self._failed.pop(event, None)

    def run(self) -> None:
        """Until told to stop."""
        try:
            while not self.stopping:
                self._look()
        except Exception as error:  # from now on nobody looks
            self.die(f"the tensor-parallel ranks can't be watched: {one_line(error)}.")
        self._socket.close(linger=0)

    def _look(self) -> None:
        if self._socket.poll(int(1000 * POLL_SECONDS)):
            event = rank_wire.decode_from_rank(self._socket.recv())
            if isinstance(event, rank_wire.Failed):
                with self._lock:
                    self._failed[event] = time.monotonic()
            self.events.put(event)
            return
        for rank, process in enumerate(self.processes, start=1):
            if process.poll() is not None and not self.stopping:
                self.die(f"tensor-parallel rank {rank} ended: {how_it_ended(process)}.")
        with self._lock:
            failed = list(self._failed.items())
        for event, since in failed:
            if time.monotonic() - since > GRACE_SECONDS:
                self.die_of(event.rank, event.name)

    def die_of(self, rank: int, name: str) -> None:
        """End because of what a rank alone failed of; its log says more than clients are told."""
        self.die(f"tensor-parallel rank {rank} failed where others didn't ({name}).")

    def die(self, why: str) -> None:
        """Note that the model isn't whole any more, and end what waits for the lost part."""
        with self._lock:
            if self.death is not None or self.stopping:
                return
            self.death = why
        logger.error("%s", why)
        for process in self.processes:
            process.kill()
        if self.group is not None:
            with contextlib.suppress(Exception):  # gloo has noticed by itself
                self.group.abort()


def _end(
    watch: _Watch, sockets: list[zmq.Socket[bytes]], context: zmq.Context[Any], folder: Path
) -> None:
    watch.stopping = True
    for socket in sockets:
        with contextlib.suppress(zmq.ZMQError):
            socket.send(rank_wire.encode(rank_wire.Quit()), flags=zmq.NOBLOCK)
    deadline = time.monotonic() + QUIT_SECONDS
    for process in watch.processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        if process.poll() is None:
            process.kill()
            process.wait()
    watch.join(QUIT_SECONDS)
    for socket in sockets:
        socket.close(linger=0)
    context.destroy(linger=0)
    shutil.rmtree(folder, ignore_errors=True)
