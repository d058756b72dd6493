"""The list of checks: name, what must have passed before it means anything, and what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_engine.testing.subject import Subject

#: A check says what it looked at, and raises `Fault` or `Skip`.
CheckFunction = Callable[["Subject"], str]

#: All checks in the order in which they run: name -> the checks that it needs. Names are stable.
CHECKS: dict[str, tuple[str, ...]] = {
    "hooks-fit": (),
    "checkpoint-opens": ("hooks-fit",),
    "model-builds": ("checkpoint-opens",),
    "weights-load": ("model-builds",),
    "mapper-tensors": ("checkpoint-opens",),
    "mapper-keys": ("model-builds", "mapper-tensors"),
    "image-modes": ("mapper-tensors",),
    "placeholder-text": ("checkpoint-opens",),
    "processor": ("mapper-tensors",),
    "wrong-placeholders": ("processor",),
    "counts": ("mapper-keys",),
    "max-tokens": ("counts",),
    "dummy-data": ("processor", "max-tokens"),
    "encoder-output": ("mapper-keys",),
    "same-in-batch": ("max-tokens", "encoder-output"),
    "same-from-cache": ("max-tokens", "encoder-output"),
    "same-in-chunks": ("max-tokens", "encoder-output"),
    "parity-pixel-values": ("mapper-keys",),
    "parity-tower": ("parity-pixel-values",),
    "parity-projector": ("parity-tower",),
    "parity-image-rows": ("parity-projector",),
    "parity-merged": ("parity-image-rows", "max-tokens"),
    "parity-logits": ("parity-merged",),
    "parity-text": ("parity-logits",),
}

#: Checks that run all the same if the named one could not, but mean nothing if it failed.
UNLESS_FAILED = {"image-modes": "mapper-keys", "processor": "mapper-keys"}

FUNCTIONS: dict[str, CheckFunction] = {}


def check(name: str) -> Callable[[CheckFunction], CheckFunction]:
    """Mark a function as the check `name`."""

    def mark(function: CheckFunction) -> CheckFunction:
        assert name in CHECKS and name not in FUNCTIONS, name
        FUNCTIONS[name] = function
        return function

    return mark
