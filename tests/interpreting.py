"""An older Triton's interpreter as it is in 3.9, for kernels that loop."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from packaging.version import Version


def take_bounds_as_scalars() -> None:
    """Let a kernel loop over `range(number)` under the interpreter.

    Every number is an array of one there. Triton 3.6 hands it to `int` as it is, which NumPy warns
    of and from 2.4 on refuses; 3.9 takes the scalar out of it first, as is done here.
    """
    try:
        if Version(metadata.version("triton")) >= Version("3.9"):
            return
    except metadata.PackageNotFoundError:  # no kernels to interpret
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patch_more(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    interpreter._patch_lang_tensor = patch_more
