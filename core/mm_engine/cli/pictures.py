"""Pictures that are named on the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_engine.errors import RequestError


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture's file, and what it shows."""

    path: Path
    encoded: bytes = b""
    image: Any = None  # PIL's, upright and RGB

    @property
    def mime(self) -> str:
        """The MIME type of `encoded`."""
        from mm_engine.inputs.image_header import read_header

        return f"image/{read_header(self.encoded).format.lower()}"


def open_picture(path: Path) -> Picture:
    """Read and decode a picture.

    Raises:
        RequestError: the file can't be read, is too large or holds no picture.
    """
    from mm_engine.inputs.media import MediaLimits, decode_image  # here: it imports PIL

    limits = MediaLimits()
    try:
        with path.open("rb") as file:
            encoded = file.read(limits.max_bytes + 1)  # of a film not more than shows that it's one
    except OSError as error:
        raise RequestError(
            f"the picture can't be read: {path} ({error.strerror}). Check the path."
        ) from None
    return Picture(path, encoded, decode_image(encoded, limits))


def read_picture(path: Path) -> Any:
    """Return the PIL image in a file.

    Raises:
        RequestError: as `open_picture`.
    """
    return open_picture(path).image
