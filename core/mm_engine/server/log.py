"""The log: one line for each event on stderr, without prompts, keys, pictures or tracebacks."""

from __future__ import annotations

import logging
import sys

from rich.console import Console
from rich.logging import RichHandler

from mm_engine.server.errors import place_of


class NoTraceback(logging.Filter):
    """Replaces a traceback, whose values could be anyone's, by its place."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record; always keep it (called by logging)."""
        if record.exc_info and record.exc_info[1] is not None:
            record.msg = f"{record.getMessage().strip()}: {place_of(record.exc_info[1])}"
            record.args = None
        record.exc_info = record.exc_text = None
        return True


def configure_logging(level: str) -> None:
    """Send the log of mm-engine and uvicorn to stderr; coloured on a terminal."""
    handler: logging.Handler
    if sys.stderr.isatty():
        handler = RichHandler(
            console=Console(stderr=True), show_path=False, omit_repeated_times=False
        )
    else:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    handler.addFilter(NoTraceback())
    for name, own_level in (("mm_engine", level.upper()), ("uvicorn", "WARNING")):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(own_level)
        logger.propagate = False
