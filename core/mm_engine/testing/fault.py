"""What a check may come to besides passing: a fault of the plugin's, or nothing to check."""

from __future__ import annotations

import re
import traceback
from dataclasses import dataclass
from pathlib import Path

from mm_engine.errors import MMEngineError
from mm_engine.plugins.blame import one_line

CORE = Path(__file__).parents[1]
#: `mm-foo 0.1.0 · input_processor (mm_foo/plugin.py:42): expected …, got ….`
BLAME = re.compile(
    r"^(?P<label>.*?) · (?P<hook>\S+)(?: \((?P<place>[^)]*)\))?: (?P<fact>.*)$", re.S
)
#: What to look at, by words of the engine's own blame.
HINTS = {
    "unchanged": "work on a copy: PIL's paste, thumbnail and putpixel write in place, and so do "
    "tensor methods that end in _",
    "took longer": "a loop that doesn't end, a lock, a download",
}


@dataclass(eq=False)
class Fault(Exception):
    """A breach of the contract: which hook (or method of the model), and how."""

    hook: str | None
    place: str | None
    expected: str
    got: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.hook}: expected {self.expected}, got {self.got}"


class Skip(Exception):
    """There is nothing to check here, and why."""


def fault_of(error: BaseException) -> Fault:
    """Return what a check's exception says: the engine's own blame, or an exception's place."""
    if isinstance(error, Fault):
        return error
    if not isinstance(error, MMEngineError):
        return Fault(None, _place_of(error), "no exception", f"{one_line(error)}")
    found = BLAME.match(str(error))
    if found is None:
        return Fault(None, None, "a plugin that the engine can start with", str(error))
    fact = found["fact"].strip().rstrip(".")
    hint = next((hint for words, hint in HINTS.items() if words in fact), "")
    if not fact.startswith("expected ") and " raised " not in f" {fact}" and ". " in fact:
        fact, _, hint = fact.partition(". ")
    wanted, comma, got = fact.rpartition(", got ")
    if comma and wanted.startswith("expected "):
        expected = wanted.removeprefix("expected ")
    elif " raised " in f" {fact}":
        expected, got = "no exception", fact
    else:
        expected, got = "what the hook's specification says", fact
    return Fault(found["hook"], found["place"], expected, got, hint)


def _place_of(error: BaseException) -> str | None:
    """The last line outside of the engine and of installed libraries, or else the last one."""
    frames = traceback.extract_tb(error.__traceback__)
    theirs = [
        frame
        for frame in frames
        if "site-packages" not in frame.filename and CORE not in Path(frame.filename).parents
    ]
    if not frames:
        return None
    frame = (theirs or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"
