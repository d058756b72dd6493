"""A host of pictures that takes every question and never answers."""

from __future__ import annotations

import socketserver
import threading
from types import TracebackType
from typing import Any


class SilentHost(socketserver.ThreadingTCPServer):
    """Listens on a free port of 127.0.0.1 inside `with`."""

    daemon_threads = True
    num_asked = 0  # requests that came to the end of their heads
    num_open = 0  # of their connections those that the client hasn't ended

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Asked)
        self.lock = threading.Lock()
        self.address = f"127.0.0.1:{self.server_address[1]}"
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    def __enter__(self) -> SilentHost:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that is reset has ended, too (called by socketserver)."""


class _Asked(socketserver.StreamRequestHandler):
    server: SilentHost

    def handle(self) -> None:
        """Wait until the client has gone (called by socketserver)."""
        while self.rfile.readline() != b"\r\n":
            pass
        with self.server.lock:
            self.server.num_asked += 1
            self.server.num_open += 1
        try:
            self.rfile.read()
        finally:
            with self.server.lock:
                self.server.num_open -= 1
