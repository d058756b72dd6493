"""Pictures that are named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mm_engine.errors import RequestError


def read_picture(path: Path) -> Any:
    """Return the PIL image in a file.

    Raises:
        RequestError: the file can't be read or holds no picture.
    """
    from mm_engine.inputs.media import decode_image  # here: it imports PIL

    try:
        encoded = path.read_bytes()
    except OSError as error:
        raise RequestError(
            f"the picture can't be read: {path} ({error.strerror}). Check the path."
        ) from None
    return decode_image(encoded)
