"""Importing a plugin's module: whatever it raises, and however long it takes, is one error."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

from mm_engine.errors import PluginError, StartupError
from mm_engine.plugins.blame import may_be_the_users, one_line, with_time_limit

MIN_SECONDS = 60.0  # the least limit: an import of large libraries takes longer than a hook may


def import_guarded(
    load: Callable[[], ModuleType], timeout: float | None, what: str, module: str, remedy: str
) -> ModuleType:
    """Return `load()`; with a `timeout`, it may take that many seconds, or `MIN_SECONDS`.

    It is called in a thread then, so that a signal that ends the program isn't taken for the
    plugin's: it is raised in the main thread, which waits.

    Raises:
        StartupError: `load` raised, or takes too long: `<what> can't be imported: <module> …`.
    """

    def outcome() -> ModuleType | BaseException:
        try:
            return load()
        except BaseException as error:  # a plugin may raise anything, SystemExit too
            if may_be_the_users(error):
                raise
            return error

    limit = None if timeout is None else max(timeout, MIN_SECONDS)
    try:
        found = with_time_limit(outcome, limit, what)
    except PluginError as error:  # the limit's: what the plugin raises is returned
        fact = f"{module} takes longer than {limit:g} s"
        raise StartupError(f"{what} can't be imported: {fact}. {remedy}") from error
    if isinstance(found, BaseException):
        fact = f"{module} raised {one_line(found)}"
        raise StartupError(f"{what} can't be imported: {fact}. {remedy}") from found
    return found
