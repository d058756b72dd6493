"""One distribution's damaged metadata harms nobody else.

`importlib.metadata.entry_points()` reads the files of all that is installed, and raises for one
that isn't text: torch calls it when it is imported. In the processes that mm-engine starts, what
can't be read counts as empty; `engine plugins doctor` and `list` tell whose it is.
"""

from __future__ import annotations

from importlib import metadata
from typing import Any

#: As Python has them, which raise.
_read_text: Any = metadata.PathDistribution.read_text
_entry_points: Any = metadata.Distribution.entry_points
_files: Any = metadata.Distribution.files


class ExactDistribution(metadata.PathDistribution):
    """A folder of metadata, read as it is: what is damaged raises."""

    read_text = _read_text
    entry_points = _entry_points
    files = _files


def pass_over_damage() -> None:
    """From now on, in this process, metadata that can't be read is empty instead of an error."""
    changed: Any = metadata.Distribution
    changed.entry_points = property(_entry_points_or_none)
    changed.files = property(_files_or_none)
    changed = metadata.PathDistribution
    changed.read_text = _text_or_none


def _text_or_none(self: metadata.PathDistribution, filename: Any) -> str | None:
    try:
        text: str | None = _read_text(self, filename)
    except (OSError, UnicodeDecodeError):
        return None
    return text


def _entry_points_or_none(self: metadata.Distribution) -> Any:
    try:
        return _entry_points.fget(self)
    except Exception:  # the parser raises what comes along
        return metadata.EntryPoints(())


def _files_or_none(self: metadata.Distribution) -> Any:
    try:
        return _files.fget(self)
    except Exception:  # likewise
        return None
