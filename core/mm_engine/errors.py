"""What can go wrong, by whose fault it is. Messages read `<fact>: <value>. <remedy>.`"""

from __future__ import annotations


class MMEngineError(Exception):
    """The root of every error that this package raises on purpose.

    `status` is the HTTP status that the server answers with, `kind` the `type` in its body.
    """

    status = 500
    kind = "server_error"


class RequestError(MMEngineError):
    """The caller's input is at fault. `param` names the field, `status` is 400, 404 or 413.

    A plugin raises it for an item that its model can't take: the message reaches the user, and no
    other request is touched. `code` is the machine-readable reason in the answer's body.
    """

    kind = "invalid_request_error"

    def __init__(
        self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.param = param
        self.status = status
        self.code = code


class Overloaded(MMEngineError):
    """The bounded queue is full (429) or the server is draining (503).

    `reason` is a word for what there is too much of, which counts such refusals.
    """

    kind = "overloaded_error"

    def __init__(
        self,
        message: str,
        *,
        retry_after: int = 1,
        status: int = 429,
        reason: str = "queue_full",
    ) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        self.status = status
        self.reason = reason


class PluginError(MMEngineError):
    """A plugin broke its contract; the message names distribution, version, hook and place."""

    kind = "plugin_error"


class EngineDead(MMEngineError):
    """The engine process is gone; nothing it was asked will be answered.

    `retry_after` is given where another engine is being started: seconds.
    """

    status = 503
    kind = "engine_dead"

    def __init__(self, message: str, *, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class DeadlineExceeded(MMEngineError):
    """The time that a request had is over before its answer was whole."""

    status = 504
    kind = "timeout_error"


class StartupError(MMEngineError):
    """The engine can't start as asked; the CLI prints the one sentence and exits with 1.

    A plugin raises it for a checkpoint that it can't serve, in a hook or while the model is built.
    """


#: The classes that may cross from the engine process to the front, by name.
ERRORS_BY_NAME: dict[str, type[MMEngineError]] = {
    cls.__name__: cls for cls in (RequestError, Overloaded, PluginError, EngineDead, StartupError)
}
