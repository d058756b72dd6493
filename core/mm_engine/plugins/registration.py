"""Pluggy's checks of a plugin's hooks, made fatal and readable."""

from __future__ import annotations

import difflib
import inspect
import warnings
from types import ModuleType

import pluggy

from mm_engine.errors import PluginError
from mm_engine.plugins import hookspecs
from mm_engine.plugins.blame import one_line, place_of
from mm_engine.plugins.retired import Retired

REQUIRED = ("model_class", "max_tokens")


def hook_names(specs: ModuleType = hookspecs) -> list[str]:
    """Return the names of all hooks, in the order of `hookspecs.py`."""
    return [name for name, value in vars(specs).items() if hasattr(value, f"{specs.PROJECT}_spec")]


def signature_of(hook: str, specs: ModuleType = hookspecs) -> str:
    """Return a hook's signature without its types: `max_tokens(ctx, modality)`."""
    return f"{hook}({', '.join(inspect.signature(getattr(specs, hook)).parameters)})"


def register(module: ModuleType, label: str, specs: ModuleType = hookspecs) -> pluggy.PluginManager:
    """Return a manager with `module` as its one plugin, held to `specs`.

    Raises:
        PluginError: a marked function is no hook or takes arguments that its hook doesn't have, or
            a required hook is missing.
    """
    manager = pluggy.PluginManager(specs.PROJECT)
    manager.add_hookspecs(specs)
    implemented = set()
    for name in dir(module):
        options = manager.parse_hookimpl_opts(module, name)
        if options is not None:
            hook = options.get("specname") or name
            _check_marked(hook, getattr(module, name), label, specs)
            implemented.add(hook)
    for hook in REQUIRED:
        if hook not in implemented:
            raise PluginError(_missing(hook, module, label))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Retired)  # `retired_uses` says it, and who it is
            manager.register(module)
    except pluggy.PluginValidationError as error:  # what the checks above don't know of
        raise PluginError(f"{label}: {one_line(error)}.") from error
    return manager


def _check_marked(hook: str, function: object, label: str, specs: ModuleType) -> None:
    where = f"{label} · {hook} ({place_of(function)})"
    names = hook_names(specs)
    if hook not in names:
        close = difflib.get_close_matches(hook, names, n=1)
        remedy = f"Did you mean {signature_of(close[0], specs)}" if close else f"The hooks: {names}"
        raise PluginError(f"{where}: marked with @hookimpl, but there is no such hook. {remedy}?")
    arguments, _ = pluggy._hooks.varnames(function)
    wanted = inspect.signature(getattr(specs, hook)).parameters
    unknown = [name for name in arguments if name not in wanted]
    if unknown:
        raise PluginError(
            f"{where}: expected {signature_of(hook, specs)}, "
            f"got an argument named {', '.join(unknown)}."
        )
    if inspect.isgeneratorfunction(function) or inspect.iscoroutinefunction(function):
        raise PluginError(f"{where}: expected a plain function, got a generator or coroutine.")


def _missing(hook: str, module: ModuleType, label: str) -> str:
    message = f"{label} · {hook} ({module.__name__}): a required hook is missing. "
    if callable(getattr(module, hook, None)):
        return message + "The function is there; mark it with @hookimpl."
    return message + f"Write {signature_of(hook)} and mark it with @hookimpl."
