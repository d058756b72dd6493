"""The server's own log, on stderr; the format that its other processes share is `mm_engine.log`."""

from __future__ import annotations

import logging
import sys
from typing import Literal

from rich.console import Console
from rich.logging import RichHandler

from mm_engine.log import Format, JSONLines, NoTraceback, TextLines, send_to


def configure_logging(level: str, style: Format | Literal["auto"] = "auto") -> None:
    """Send the log of mm-engine and uvicorn to stderr.

    `auto` is text on a terminal, where it is coloured, and JSON elsewhere.
    """
    terminal = sys.stderr.isatty()
    handler: logging.Handler
    if style == "json" or (style == "auto" and not terminal):
        handler = logging.StreamHandler()
        handler.setFormatter(JSONLines("server"))
    elif terminal:
        handler = RichHandler(
            console=Console(stderr=True), show_path=False, omit_repeated_times=False
        )
        handler.setFormatter(TextLines("%(message)s"))
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(TextLines("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(NoTraceback())
    send_to(handler, level.upper(), "uvicorn")
