"""HTTP servers that pictures are fetched from, good and bad ones; they count who comes."""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

import pytest

from pictures import encode, quarters

PICTURE = encode(quarters())
#: For tests that listen at several addresses of this machine.
several_addresses = pytest.mark.skipif(
    sys.platform != "linux", reason="other systems have one loopback address"
)
Answer = Callable[[BaseHTTPRequestHandler], None]


class Origin(ThreadingHTTPServer):
    """A server on a free port of one address; each path has its answer, others are 404.

    `num_hits` counts connections, those that send nothing too, and `requests` holds the path and
    the headers of what was asked. Answers without end are to ask `gone` or `stopping`.
    """

    daemon_threads = False  # so that leaving waits for them
    num_hits = 0

    def __init__(
        self,
        answers: Mapping[str, Answer] | None = None,
        *,
        address: str = "127.0.0.1",
        port: int = 0,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.answers = {"/picture.png": send(PICTURE), **(answers or {})}
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.names: list[str | None] = []  # that TLS was asked for
        self.stopping = threading.Event()
        self.num_gone = 0  # connections that the client ended before the answer
        super().__init__((address, port), _Handler)
        self.port = self.server_address[1]
        if tls is not None:
            tls.sni_callback = lambda opened, name, context: self.names.append(name)
            self.socket = tls.wrap_socket(self.socket, server_side=True)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept, and count (called by socketserver)."""
        self.num_hits += 1
        return super().get_request()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that leave are what some tests are about."""

    def __enter__(self) -> Origin:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stopping.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    server: Origin

    def do_GET(self) -> None:
        """Answer (called by http.server)."""
        self.server.requests.append((self.path, dict(self.headers.items())))
        answer = self.server.answers.get(self.path, status(404))
        try:
            answer(self)
        except OSError:
            self.server.num_gone += 1

    def log_message(self, *args: Any) -> None:
        """Nothing."""


def send(body: bytes, code: int = 200, **headers: str) -> Answer:
    """A whole answer; an underscore in a header's name is a hyphen."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def status(code: int) -> Answer:
    """No picture."""
    return send(b"secret", code)


def redirect(location: str, code: int = 302) -> Answer:
    """A redirect."""
    return send(b"", code, Location=location)


def drip(start: bytes, seconds: float, piece: bytes = b"x") -> Answer:
    """Raw bytes, then a piece every so many seconds until the client has gone."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        assert isinstance(handler.server, Origin)
        handler.wfile.write(start)
        while not handler.server.stopping.is_set():
            if seconds:
                handler.connection.settimeout(seconds)
                with contextlib.suppress(TimeoutError):
                    if not handler.connection.recv(1):
                        raise ConnectionResetError
            handler.wfile.write(piece)

    return answer


def slow(answer: Answer, seconds: float) -> Answer:
    """Another answer, some time later."""

    def late(handler: BaseHTTPRequestHandler) -> None:
        time.sleep(seconds)
        answer(handler)

    return late


def certificate(folder: Path, name: str) -> tuple[Path, ssl.SSLContext]:
    """A certificate for a name that signs itself, and the context of a server that has it."""
    file, key = folder / f"{name}.pem", folder / f"{name}.key"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2"
    subprocess.run(
        [
            *command.split(),
            *("-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}"),
            *("-keyout", str(key), "-out", str(file)),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file, key)
    return file, context
