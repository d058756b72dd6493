"""Starting the engine process, which needs nothing of what its front imports for seconds."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Iterator

from mm_engine.engine.process import SOCKET_NAME
from mm_engine.log import format_in_use
from mm_engine.processes import private_folder, spawn


class Launch:
    """An engine process that imports what it needs and waits to be told what to serve."""

    def __init__(self) -> None:
        self._folder = private_folder(SOCKET_NAME)
        self.address = f"ipc://{self._folder / SOCKET_NAME}"
        level = logging.getLogger("mm_engine").getEffectiveLevel()
        self.process = spawn(
            "mm_engine.engine.process", self.address, os.getpid(), level, format_in_use()
        )

    def end(self) -> None:
        """End the process, if it hasn't yet, and leave nothing behind."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()  # no zombie stays
        shutil.rmtree(self._folder, ignore_errors=True)


@contextlib.contextmanager
def launched() -> Iterator[Launch]:
    """An engine process for `EngineClient.start`, launched before the caller's own imports.

    The two import side by side then. It has ended when this is left.
    """
    launch = Launch()
    try:
        yield launch
    finally:
        launch.end()
