"""What the engine process does: build the engine, then listen, step and send."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import zmq

from mm_engine.engine import wire
from mm_engine.engine.build import build_engine
from mm_engine.engine.engine import Engine
from mm_engine.engine.fault_barrier import explain, place_of
from mm_engine.errors import EngineDead, MMEngineError
from mm_engine.outputs import RequestOutput
from mm_engine.request import Request
from mm_engine.worker.loader import open_model
from mm_engine.worker.model_shard import share_threads

logger = logging.getLogger(__name__)

LINGER_MS = 2000  # how long the last message may take to leave
IDLE_SECONDS = 1.0  # how often an idle engine looks after its device


class Connection:
    """The engine's end of the line to the front."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.connect(address)
        self._kept: dict[str, wire.Tensors] = {}  # what the front had us keep, by content key

    def send(self, message: wire.FromEngine) -> None:
        """Send a message; never blocks."""
        self._socket.send_multipart(wire.encode(message), copy=False)

    def receive(self, *, wait: float | None) -> tuple[wire.ToEngine, Sequence[wire.Frame]] | None:
        """The next message and all its frames; None if none comes in `wait` seconds.

        Without a limit it waits as long as it takes.
        """
        if not self._socket.poll(None if wait is None else int(1000 * wait)):
            return None
        frames = [frame.buffer for frame in self._socket.recv_multipart(copy=False)]
        return wire.decode_to_engine(frames), frames

    def unpack(self, packed: wire.PackedRequest, frames: Sequence[wire.Frame]) -> Request:
        """The request in a message; messages must be unpacked in the order in which they came."""
        return wire.unpack_request(packed, frames, self._kept)

    def close(self) -> None:
        """Send what is left, and hang up."""
        self._socket.close(linger=LINGER_MS)
        self._context.term()


def run(address: str) -> int:
    """Serve the front that listens at `address` until it says Shutdown; the exit status."""
    connection = Connection(address)
    try:
        engine = _start(connection)
        if engine is None:
            return 1
        try:
            _serve(connection, engine)
        except EngineDead as error:
            connection.send(wire.Failed("EngineDead", str(error)))
            return 1
        finally:
            engine.runner.close()
        return 0
    finally:
        connection.close()


def _start(connection: Connection) -> Engine | None:
    """Build the engine that the first message asks for; None if that failed."""
    received = connection.receive(wait=None)
    assert received is not None
    message, frames = received
    assert isinstance(message, wire.Start)
    try:
        profile_request = connection.unpack(message.profile_request, frames)
        if message.config.tensor_parallel_size > 1:
            share_threads(message.config.tensor_parallel_size)
        opened = open_model(message.config, message.plugin)
        engine = build_engine(opened, message.config, profile_request)
    except MMEngineError as error:
        connection.send(wire.Failed(type(error).__name__, str(error)))
        return None
    except (Exception, SystemExit) as error:
        logger.debug("The engine can't start.", exc_info=error)
        what = f"the engine can't start: {error} ({place_of(error)})."
        connection.send(wire.Failed("StartupError", f"{what} The log at level debug says more."))
        return None
    assert engine.info is not None
    connection.send(wire.Ready(engine.info))
    return engine


def _serve(connection: Connection, engine: Engine) -> None:
    """Step while there is work, listening in between; without work, sleep until a message comes."""
    while True:
        engine.runner.check()
        wait = 0.0 if engine.has_work else IDLE_SECONDS
        while (received := connection.receive(wait=wait)) is not None:
            message, frames = received
            if isinstance(message, wire.Shutdown):
                return
            if isinstance(message, wire.Add):
                _add(connection, engine, message.request, frames)
            elif isinstance(message, wire.Abort):
                engine.abort(message.request_id, notify=False)
            elif isinstance(message, wire.StatsRequest):
                connection.send(wire.Stats(engine.stats()))
            wait = 0.0 if engine.has_work else IDLE_SECONDS
        outputs = engine.step() if engine.has_work else []
        if outputs:
            connection.send(wire.Outputs(outputs))


def _add(
    connection: Connection, engine: Engine, packed: wire.PackedRequest, frames: Sequence[wire.Frame]
) -> None:
    try:
        engine.add(connection.unpack(packed, frames))
        return
    except Exception as error:
        refusal = RequestOutput(packed.request_id, finished=True, error=explain(error))
    connection.send(wire.Outputs([refusal]))
