"""Lines of the log, alike in all processes of a server: text for people, or JSON for programs.

No line holds prompts, keys, pictures or, unless one is asked for at level debug, a traceback.
"""

from __future__ import annotations

import json
import logging
import re
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any, Literal

from mm_engine.errors import MMEngineError, PluginError

Format = Literal["text", "json"]

#: The id of the HTTP request that is being answered, where one is.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
#: The message of the exception that a plugin raised, behind its class.
_FOREIGN = re.compile(r"(\braised \w+): .*", re.DOTALL)
#: Libraries whose loggers bring handlers of their own when they are imported.
_WITH_HANDLERS = ("torch", "transformers", "huggingface_hub")


def place_of(error: BaseException) -> str:
    """Where an exception came from: its class, file and line.

    Its message and traceback may hold prompts, keys or paths, so they are left out.
    """
    traceback = error.__traceback__
    if traceback is None:
        return type(error).__name__
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    code = traceback.tb_frame.f_code
    name = PurePath(code.co_filename).name
    return f"{type(error).__name__} at {name}:{traceback.tb_lineno} in {code.co_name}"


def told_of(error: BaseException) -> str:
    """What a line may say of an exception: the message of one of ours, else its class and place.

    What an exception of a plugin's own says may be anything, so it is left out of `PluginError`'s.
    """
    if isinstance(error, PluginError):
        return _FOREIGN.sub(r"\1.", str(error))
    return str(error) if isinstance(error, MMEngineError) else place_of(error)


class NoTraceback(logging.Filter):
    """Replaces a traceback, whose values could be anyone's, by its place.

    With `keep_debug` those of level debug stay: somebody has asked for them.
    """

    def __init__(self, *, keep_debug: bool = False) -> None:
        super().__init__()
        self._keep_debug = keep_debug

    def filter(self, record: logging.LogRecord) -> bool:
        """Rewrite the record; always keep it (called by logging)."""
        if self._keep_debug and record.levelno <= logging.DEBUG:
            return True
        if record.exc_info and record.exc_info[1] is not None:
            record.msg = f"{record.getMessage().strip()}: {place_of(record.exc_info[1])}"
            record.args = None
        record.exc_info = record.exc_text = None
        return True


class TextLines(logging.Formatter):
    """A line for people; behind it the id of the HTTP request that it is about, if it is."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        """The line without a traceback (called by logging)."""
        line, asked = super().formatMessage(record), request_id.get()
        return line if asked is None else f"{line} · request {asked}"


class JSONLines(logging.Formatter):
    """A JSON object, in ASCII and on one line.

    `time` is RFC 3339 in UTC, `process` says which of a server's processes wrote it. A record's
    `fields` (`extra={"fields": {…}}`) stand beside its message.
    """

    def __init__(self, process: str, rank: int | None = None) -> None:
        super().__init__()
        self._of: dict[str, Any] = {"process": process}
        if rank is not None:
            self._of["rank"] = rank

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record (called by logging)."""
        moment = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": moment.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **self._of,
            "pid": record.process,
        }
        asked = request_id.get()
        if asked is not None:
            line["request_id"] = asked
        line |= getattr(record, "fields", {})
        if record.exc_info:  # of level debug: see `NoTraceback`
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def send_to(handler: logging.Handler, level: int | str, *others: str) -> None:
    """Have the loggers of mm-engine use a handler alone, and `others` from warnings on.

    What no logger's own handler takes goes there, too, from warnings on; where the lines are JSON,
    Python's warnings as well.
    """
    for name, own_level in (("mm_engine", level), *((name, "WARNING") for name in others)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(own_level)
        logger.propagate = False
    logging.basicConfig(handlers=[handler])  # does nothing where a test listens already
    if isinstance(handler.formatter, JSONLines):
        logging.captureWarnings(True)


def configure_child(level: int, style: str, process: str, rank: int | None = None) -> None:
    """Have a process that a server started log to stderr, in the server's format."""
    handler = logging.StreamHandler()
    name = process if rank is None else f"{process} {rank}"
    mark = f"%(asctime)s %(levelname)s {name} [%(process)d]: %(message)s"
    handler.setFormatter(JSONLines(process, rank) if style == "json" else TextLines(mark))
    handler.addFilter(NoTraceback(keep_debug=True))
    send_to(handler, level)


def format_in_use() -> Format:
    """What this process writes, for the processes that it starts."""
    handlers = [*logging.getLogger("mm_engine").handlers, *logging.getLogger().handlers]
    return "json" if any(isinstance(h.formatter, JSONLines) for h in handlers) else "text"


def adopt_libraries() -> None:
    """Where the lines are JSON, have those of libraries that were imported be JSON, too."""
    if format_in_use() != "json":
        return
    for name in _WITH_HANDLERS:
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
