"""`mm_processor_kwargs`: options of the image mapper that clients may set."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from typing import Any

from mm_engine.errors import PluginError, RequestError, StartupError
from mm_engine.log import told_of
from mm_engine.plugins.blame import no_more_calls

logger = logging.getLogger(__name__)

FIELD = "mm_processor_kwargs"
FLAG = "--allowed-mm-processor-kwargs"
MAX_SIDE, MAX_PIXELS = 4096, 2**24  # of numbers; options that count pixels say so in their names
MAX_VALUES = 64  # in one option; characters of a text, too


def check_options(asked: Mapping[str, Any] | None, allowed: Collection[str]) -> None:
    """Refuse options that clients may not set, and values that would take much memory.

    Raises:
        RequestError: one isn't allowed, or is too large.
    """
    for name, value in (asked or {}).items():
        if name not in allowed:
            raise RequestError(
                f"{FIELD} names an option that this server doesn't let clients set. "
                f"It lets them set {', '.join(allowed) or 'none'} ({FLAG}).",
                param=FIELD,
            )
        most = MAX_PIXELS if "pixels" in name else MAX_SIDE
        least = 1 if "pixels" in name or "size" in name else -most
        if not _is_within(value, least, most):
            raise RequestError(
                f"{FIELD}.{name} is out of range. It has at most {MAX_VALUES} values, numbers up "
                f"to {most}; sizes and pixels from 1.",
                param=FIELD,
            )


def blame(asked: Mapping[str, Any] | None, error: Exception) -> Exception:
    """The error to tell where a plugin failed on images that were made as a request `asked`.

    Nobody but the model knows what it can take of them, and it says so by failing. The log is told
    how: perhaps the plugin is at fault after all.
    """
    if not asked or not isinstance(error, PluginError) or no_more_calls():
        return error
    told = told_of(error)
    logger.warning("With %s of a request: %s", FIELD, told)
    return RequestError(
        f"the model fails on images as these options make them: {told} Change or leave out "
        f"{FIELD}.",
        param=FIELD,
    )


def check_allowed(allowed: Collection[str], known: Collection[str] | None) -> None:
    """Refuse to start with names that the model's mapper doesn't have; None: it may have any.

    Raises:
        StartupError: with those that it has.
    """
    unknown = [] if known is None else sorted(set(allowed) - set(known))
    if unknown:
        raise StartupError(
            f"{FLAG} names an option that the model's image mapper doesn't have: {unknown[0]}. "
            f"It has {', '.join(sorted(known or ())) or 'none'}."
        )


def _is_within(value: Any, least: int, most: int) -> bool:
    waiting, num_values = [value], 0
    while waiting:
        value = waiting.pop()
        num_values += 1
        if num_values > MAX_VALUES or (isinstance(value, str) and len(value) > MAX_VALUES):
            return False
        if isinstance(value, int | float) and not least <= value <= most:  # nor nan
            return False
        if isinstance(value, dict | list):
            waiting += value.values() if isinstance(value, dict) else value
    return True
