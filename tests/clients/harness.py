"""What the checks of Python clients share. It runs in the clients' own environment.

A check is a function that asserts and returns what it saw, registered with what it calls. One more
is one more such function: nothing else has to know of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable

URL = os.environ["SERVER"]  # of a server with the demo, up to /v1
TIGHT_URL = os.environ["TIGHT_SERVER"]  # of one that takes a single request at a time
KEYED_URL = os.environ["KEYED_SERVER"]  # of one that wants a key
PICTURE = os.environ["PICTURE"]  # a data URL
BROKEN_PICTURE = os.environ["BROKEN_PICTURE"]  # one whose file is cut off
QUESTION = "Describe the image."
MIN_IMAGE_TOKENS = 15

CHECKS: list[tuple[str, Callable[[], str]]] = []


def check(called: str) -> Callable[[Callable[[], str]], Callable[[], str]]:
    """Register a check of what is called."""

    def register(function: Callable[[], str]) -> Callable[[], str]:
        CHECKS.append((called, function))
        return function

    return register


def raised(kind: type[Exception], call: Callable[[], object]) -> str:
    """What a call that has to fail says."""
    try:
        call()
    except kind as error:
        return f"{type(error).__name__}: {getattr(error, 'body', None) or error}"
    raise AssertionError(f"no {kind.__name__}")


def main() -> None:
    """Run the checks, one line of JSON for each."""
    for called, function in CHECKS:
        try:
            line = {"called": called, "saw": function(), "passed": True}
        except Exception as error:
            line = {"called": called, "saw": f"{type(error).__name__}: {error}", "passed": False}
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
