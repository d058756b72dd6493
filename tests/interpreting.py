"""Triton's interpreter as it is in newer versions, for kernels that loop."""

from __future__ import annotations

from typing import Any


def take_bounds_as_scalars() -> None:
    """Let a kernel loop over `range(number)` under the interpreter.

    Every number is an array of one there. Triton 3.6 hands it to `int` as it is, which NumPy warns
    of and from 2.4 on refuses; newer versions take the scalar out of it first, as is done here.
    """
    try:
        from triton.runtime import interpreter
    except ImportError:  # no Triton, no kernels to interpret
        return
    patch = interpreter._patch_lang_tensor

    def patch_more(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_more
