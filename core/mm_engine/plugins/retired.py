"""The deprecation path: what is retired still works for one minor version, and says so.

A hook, or one of its arguments, is retired where it is declared, in `hookspecs.py`:

    @hookspec(
        firstresult=True,
        warn_on_impl_args={"old": Retired(since="0.2", gone_in="0.3", instead="ctx.new")},
    )

and a field of a class that hooks are given by a `RetiredField` in its place. Whoever still uses it
is named in one line of the log. Taken out of `hookspecs.py`, it is an error like any unknown name.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import PurePath
from types import ModuleType
from typing import Any

from mm_engine.plugins.blame import place_of

logger = logging.getLogger(__name__)

#: Who is being called, for `RetiredField`: `mm-foo 0.1.0 · max_tokens`.
caller: ContextVar[str] = ContextVar("caller", default="a plugin")


class Retired(DeprecationWarning):
    """What is said of a retired thing: since when, until when, and what to use instead.

    It is a warning so that pluggy takes it in `warn_on_impl` and `warn_on_impl_args`.
    """

    def __init__(self, *, since: str, gone_in: str, instead: str) -> None:
        super().__init__(
            f"is retired since mm-engine {since} and will be gone in {gone_in}. Use {instead}."
        )
        self.since = since
        self.gone_in = gone_in
        self.instead = instead


def retired_uses(functions: dict[str, Callable[..., Any]], label: str, specs: Any) -> list[str]:
    """Return a line for each retired hook or argument that `functions`, by hook, still use.

    `specs` holds the hook specifications.
    """
    lines = []
    for hook, function in functions.items():
        options = spec_options(specs, hook)
        taken = function.__code__.co_varnames[: function.__code__.co_argcount]
        notices = [("this hook", options["warn_on_impl"])] if options["warn_on_impl"] else []
        retired = options["warn_on_impl_args"] or {}
        notices += [(f"the argument {name}", retired[name]) for name in taken if name in retired]
        lines += [
            f"{label} · {hook} ({place_of(function)}): {what} {notice}" for what, notice in notices
        ]
    return lines


def spec_options(specs: ModuleType, hook: str) -> dict[str, Any]:
    """Return the options that `@hookspec` was given for a hook."""
    options: dict[str, Any] = getattr(getattr(specs, hook), f"{specs.PROJECT}_spec")
    return options


class RetiredField:
    """A field that was: reading it still works, and is logged once for each place that reads it."""

    def __init__(self, read: Callable[[Any], Any], notice: Retired) -> None:
        self._read = read
        self.notice = notice
        self._name = ""
        self._said: set[str] = set()

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = f"{owner.__name__}.{name}"

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        frame = sys._getframe(1)
        file = "/".join(PurePath(frame.f_code.co_filename).parts[-2:])
        place = f"{file}:{frame.f_lineno}"
        if place not in self._said:
            self._said.add(place)
            logger.warning("%s (%s): %s %s", caller.get(), place, self._name, self.notice)
        return self._read(instance)
