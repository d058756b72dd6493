"""From a config to a server that listens, and back: startup, signals, drain, exit code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import importlib
import logging
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from mm_engine.config import EngineConfig
from mm_engine.engine.launch import Launch, launched
from mm_engine.errors import StartupError
from mm_engine.light_imports import import_transformers
from mm_engine.log import adopt_libraries
from mm_engine.server.mapper_options import check_allowed
from mm_engine.server.settings import ServerSettings
from mm_engine.server.status_line import log_status
from mm_engine.server.supervisor import supervise

if TYPE_CHECKING:
    from mm_engine.engine.client import EngineClient
    from mm_engine.engine.status import EngineInfo
    from mm_engine.inputs.pipeline import InputPipeline
    from mm_engine.plugins.record import PluginRecord
    from mm_engine.request import Request
    from mm_engine.server.service import Service

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM)
#: What is imported after the engine process is launched.
SLOW_IMPORTS = ("mm_engine.inputs.pipeline", "mm_engine.engine.client")
#: And while that loads the model.
APP = "mm_engine.server.app"
_AFTER_DRAIN = 5.0  # seconds for the errors of unfinished answers to be sent


@dataclass(frozen=True, slots=True)
class Started:
    """What is being served, for the banner."""

    info: EngineInfo
    pipeline: InputPipeline
    settings: ServerSettings
    url: str
    #: When its imports were done, and when the engine process was told what to serve; both of
    #: `time.monotonic`, which all processes of a machine share.
    imported_at: float
    told_at: float


class Stopped(BaseException):
    """A signal asked the process to stop before it served; not an error."""


def serve(
    config: EngineConfig, settings: ServerSettings, on_start: Callable[[Started], None]
) -> int:
    """Serve until SIGINT or SIGTERM, then drain. Returns the exit code: 1 if the engine died.

    Call from the main thread. `on_start` is called when requests are taken.

    Raises:
        StartupError: the port is in use, the model can't be loaded, or OpenTelemetry is missing.
        PluginError: the plugin broke its contract on its own dummy data.
    """
    if settings.otlp_traces_endpoint is not None:
        from mm_engine.server.tracing import check_endpoint

        check_endpoint(settings.otlp_traces_endpoint)  # before anything is loaded
    with (
        contextlib.suppress(Stopped),
        _stop_on_signals(),
        listen(settings.host, settings.port) as listener,  # first: it fails in no time
        launched() as launch,
    ):
        import_transformers(*SLOW_IMPORTS)
        adopt_libraries()
        from mm_engine.inputs.pipeline import InputPipeline
        from mm_engine.worker.loader import open_model

        imported_at = time.monotonic()
        opened = open_model(config)
        pipeline = InputPipeline(opened, chat_template=settings.chat_template)
        known = pipeline.plugin.option_names(pipeline.ctx, "image")
        check_allowed(settings.allowed_mm_processor_kwargs, known)
        with asyncio.Runner(loop_factory=lambda: _Loop(settings.head_timeout)) as runner:
            return runner.run(
                _serve(config, launch, settings, pipeline, listener, imported_at, on_start)
            )
    return 0


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, so that nobody else takes the port while the model loads.

    It doesn't listen yet: until the server is ready, connections are refused and don't hang.

    Raises:
        StartupError: the address isn't ours or in use.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        # `localhost` may be both: IPv4 is what clients try in the end, whatever they try first.
        family, kind, protocol, _, address = min(found, key=lambda a: a[0] != socket.AF_INET)
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise StartupError(f"can't listen on {host}: {error.strerror}. Check --host.") from None
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise _no_port(host, port, error) from None
    return listener


def _no_port(host: str, port: int, error: OSError) -> StartupError:
    return StartupError(
        f"can't listen on {host} port {port}: {(error.strerror or str(error)).lower()}. "
        "Choose another --port, or stop what uses it."
    )


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Until the event loop takes over, let both signals unwind the stack."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Loop(asyncio.SelectorEventLoop):
    """An event loop whose servers give a TLS handshake `handshake_timeout` seconds, in place of
    asyncio's minute: uvicorn has no word for that, and until then a connection isn't ours to end.
    """

    def __init__(self, handshake_timeout: float) -> None:
        super().__init__()
        self._handshake_timeout = handshake_timeout

    async def create_server(self, *args: Any, **named: Any) -> asyncio.Server:
        """See asyncio (called by uvicorn)."""
        if named.get("ssl") is not None:
            named.setdefault("ssl_handshake_timeout", self._handshake_timeout)
        return await super().create_server(*args, **named)


class _HTTPServer(uvicorn.Server):
    """uvicorn's server, with signals left to us: its own handling ends the process by signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    config: EngineConfig,
    launch: Launch,
    settings: ServerSettings,
    pipeline: InputPipeline,
    listener: socket.socket,
    imported_at: float,
    on_start: Callable[[Started], None],
) -> int:
    stop = asyncio.Event()
    server_box: list[_HTTPServer] = []

    def on_signal() -> None:
        if stop.is_set() and server_box:  # the second time
            server_box[0].force_exit = True
        stop.set()

    loop = asyncio.get_running_loop()
    for number in SIGNALS:
        loop.add_signal_handler(number, on_signal)
    profile = await asyncio.to_thread(pipeline.dummy_request)
    told_at = time.monotonic()
    importing = asyncio.create_task(asyncio.to_thread(importlib.import_module, APP))
    from mm_engine.engine.client import EngineClient

    client = await _start_engine(config, launch, profile, pipeline.plugin.record, stop)
    if client is None:
        return 0
    try:
        pipeline.limit_length(client.info.kv_cache_tokens)
        await importing
        service, server = _build(client, pipeline, settings)
        server_box.append(server)
        gc.freeze()  # all that was imported stays: to look through it again stops every answer
        host, port = listener.getsockname()[:2]
        scheme = "https" if settings.ssl_certfile else "http"
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        started = Started(client.info, pipeline, settings, url, imported_at, told_at)

        def start_again() -> Awaitable[EngineClient]:
            return EngineClient.start(config, profile, pipeline.plugin.record)

        try:
            return await _run(
                service, server, listener, stop, lambda: on_start(started), start_again
            )
        finally:
            await service.close()
            if service.traces is not None:
                service.traces.close()
            client = service.client  # perhaps another by now
    finally:
        await client.close()


async def _start_engine(
    config: EngineConfig,
    launch: Launch,
    profile: Request,
    plugin: PluginRecord | None,
    stop: asyncio.Event,
) -> EngineClient | None:
    """Have the engine process load the model; None if a signal came first."""
    from mm_engine.engine.client import EngineClient

    starting = asyncio.create_task(EngineClient.start(config, profile, plugin, launch))
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait((starting, stopping), return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not starting.done():
        starting.cancel()
        await asyncio.gather(starting, return_exceptions=True)
        return None
    return await starting


def _build(
    client: EngineClient, pipeline: InputPipeline, settings: ServerSettings
) -> tuple[Service, _HTTPServer]:
    from mm_engine.server.app import create_app
    from mm_engine.server.connection import Limits, room_for

    app = create_app(client, pipeline, settings)
    limits = Limits(settings.head_timeout, room_for(settings.max_connections))
    config = uvicorn.Config(
        app,
        http=limits.protocol(),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        ssl_certfile=settings.ssl_certfile,
        ssl_keyfile=settings.ssl_keyfile,
        timeout_graceful_shutdown=int(settings.drain_timeout + _AFTER_DRAIN),
    )
    service: Service = app.state.service
    return service, _HTTPServer(config)


async def _run(
    service: Service,
    server: _HTTPServer,
    listener: socket.socket,
    stop: asyncio.Event,
    on_start: Callable[[], None],
    start_again: Callable[[], Awaitable[EngineClient]],
) -> int:
    """Serve until told to stop or until no engine lives; returns the exit code."""
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if serving.done():
        settings = service.settings
        try:
            await serving
        except OSError as error:  # another server bound the port too, and was first to listen
            raise _no_port(settings.host, settings.port, error) from None
        return 0
    on_start()
    stopping = asyncio.create_task(stop.wait())
    dying = asyncio.create_task(supervise(service, start_again))
    tasks = [stopping, dying]
    if service.settings.log_stats:
        tasks.append(asyncio.create_task(log_status(service, service.settings.status_interval)))
    await asyncio.wait((stopping, dying, serving), return_when=asyncio.FIRST_COMPLETED)
    died = dying.done()
    if not died:
        logger.info("stopping: no new requests, %d in flight", service.num_prompts)
    service.drain()
    deadline = asyncio.get_running_loop().call_later(service.settings.drain_timeout, service.expire)
    server.should_exit = True
    await serving
    deadline.cancel()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return 1 if died else 0
