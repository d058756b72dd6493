"""How an engine's process is spoken to: a line of JSON in, a line of JSON out.

An order is `{"do": name, …arguments}`; its answer is what the function of that name returns, or
`{"error": reason}`. Standard library only: every engine's python runs this.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

MAX_REASON = 400  # characters


def serve(orders: Mapping[str, Callable[..., dict[str, Any]]]) -> None:
    """Answer orders until stdin ends. What libraries print to stdout goes to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    for line in sys.stdin:
        arguments = json.loads(line)
        name = arguments.pop("do")
        try:
            answer = orders[name](**arguments)
        except Exception as error:  # the other side says so, and goes on
            text = " ".join(str(error).split()) or "no message"
            answer = {"error": f"{type(error).__name__}: {text}"[:MAX_REASON]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


class Events:
    """When tokens came: `[seconds, sequences that began, new tokens, sequences that ended]`."""

    def __init__(self) -> None:
        self.told: list[tuple[float, int, int, int]] = []
        self.start = time.perf_counter()

    def tell(self, began: int, new: int, ended: int) -> None:
        """A step is over."""
        self.told.append((time.perf_counter() - self.start, began, new, ended))

    def answer(self, firsts: Sequence[int]) -> dict[str, Any]:
        """All of it, and the first token of each sequence."""
        return {"events": self.told, "first_tokens": list(firsts)}


def versions(*names: str) -> dict[str, str]:
    """Of the installed packages among `names`."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def picture(seed: int, size: int) -> Any:
    """A picture of noise, `size` pixels square: features of known ones may be kept, so seeds
    must differ."""
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
