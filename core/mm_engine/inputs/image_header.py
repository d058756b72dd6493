"""What an encoded picture says about itself, read without decoding a pixel.

Each format is walked just far enough to know its size, its EXIF orientation and where it ends.
Two reasons not to leave this to PIL: a size over the limit must be refused before anything is
allocated for it, and PIL reports odd metadata as Python warnings, whose filters are global to the
process. So what PIL gets to see afterwards (`Header.pixels`) carries no metadata.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass


class BadImage(Exception):
    """The bytes are not a whole picture of a known format; the message is a fixed sentence."""


@dataclass(frozen=True, slots=True)
class Header:
    """Size and kind of an encoded picture, and its bytes without metadata."""

    format: str  # PIL's name: PNG, JPEG, WEBP or GIF
    width: int
    height: int
    orientation: int  # EXIF: 1 to 8; 1 is upright
    pixels: bytes

    @property
    def num_pixels(self) -> int:
        """Width × height, of one frame."""
        return self.width * self.height


UNKNOWN = "the data is not a PNG, JPEG, WebP or GIF picture"
TRUNCATED = "the picture is cut off before its end"
TRAILING = "there is data after the end of the picture"
CORRUPT = "the picture is corrupt"

MAX_PARTS = 20_000  # chunks, segments or sub-blocks; real files have far fewer, however long
MAX_SCANS = 100  # of a progressive JPEG: each is a pass over the whole picture

_PADDING = b"\0\r\n"  # written after the end by some cameras and by shells; harmless
#: A JPEG may hold further pictures or a video after its end if its metadata says so.
_DECLARED_TRAILERS = (b"MotionPhoto", b"MicroVideo", b"Item:Length", b"hdrgm:")


def read_header(encoded: bytes) -> Header:
    """Read size, orientation and extent of a PNG, JPEG, WebP or GIF.

    Raises:
        BadImage: another format, truncated, corrupt, or followed by other data.
    """
    try:
        if encoded.startswith(b"\x89PNG\r\n\x1a\n"):
            return _png(encoded)
        if encoded.startswith(b"\xff\xd8\xff"):
            return _jpeg(encoded)
        if encoded.startswith(b"RIFF") and encoded[8:12] == b"WEBP":
            return _webp(encoded)
        if encoded.startswith((b"GIF87a", b"GIF89a")):
            return _gif(encoded)
    except (IndexError, struct.error):
        raise BadImage(TRUNCATED) from None
    raise BadImage(UNKNOWN)


def orientation_of(exif: bytes) -> int:
    """The orientation (1 to 8) that an EXIF block states in its first directory, else 1."""
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(order + "I", exif, 4)
        (num_entries,) = struct.unpack_from(order + "H", exif, start)
        for entry in range(num_entries):
            tag, kind, count, value = struct.unpack_from(
                order + "HHIH", exif, start + 2 + 12 * entry
            )
            if tag == 0x0112:
                return value if (kind, count) == (3, 1) and 1 <= value <= 8 else 1
    except struct.error:
        pass  # a damaged EXIF block says nothing; the picture may be fine
    return 1


def _png(encoded: bytes) -> Header:
    width = height = depth = 0
    orientation = 1
    kept = [encoded[:8]]
    position = 8
    for _ in range(MAX_PARTS):
        length, kind = struct.unpack_from(">I4s", encoded, position)
        end = position + 12 + length
        if end > len(encoded):
            raise BadImage(TRUNCATED)
        if position == 8:
            if kind != b"IHDR":
                raise BadImage(CORRUPT)
            width, height, depth = struct.unpack_from(">IIB", encoded, position + 8)
        elif kind == b"IHDR":
            raise BadImage(CORRUPT)
        if kind == b"eXIf":
            orientation = orientation_of(encoded[position + 8 : end - 4])
        # A 16-bit colour key can't be matched once samples are 8 bits wide: it is left out.
        if kind in (b"IHDR", b"PLTE", b"IDAT", b"IEND") or (kind == b"tRNS" and depth < 16):
            kept.append(encoded[position:end])
        position = end
        if kind == b"IEND":
            break
    else:
        raise BadImage(CORRUPT)
    if encoded[position:].strip(_PADDING):
        raise BadImage(TRAILING)
    return _checked("PNG", width, height, orientation, b"".join(kept))


def _jpeg_segments(encoded: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield `(marker, start of its bytes, end)` up to and including the end marker (0xD9)."""
    position = 2
    num_scans = 0
    for _ in range(MAX_PARTS):
        if encoded[position] != 0xFF:
            raise BadImage(CORRUPT)
        while encoded[position + 1] == 0xFF:  # fill bytes
            position += 1
        marker = encoded[position + 1]
        if marker == 0xD9:
            yield marker, position, position + 2
            return
        (length,) = struct.unpack_from(">H", encoded, position + 2)
        end = position + 2 + length
        if length < 2:
            raise BadImage(CORRUPT)
        num_scans += marker == 0xDA
        if num_scans > MAX_SCANS:
            raise BadImage(CORRUPT)
        if marker == 0xDA:  # a scan: entropy-coded data up to the next real marker
            following = _JPEG_MARKER.search(encoded, end)
            if following is None:
                raise BadImage(TRUNCATED)
            end = following.start()
        if end > len(encoded):
            raise BadImage(TRUNCATED)
        yield marker, position, end
        position = end
    raise BadImage(CORRUPT)


_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def _jpeg(encoded: bytes) -> Header:
    width = height = 0
    orientation = 1
    trailer_declared = False
    kept = [encoded[:2]]
    end = 2
    for marker, start, end in _jpeg_segments(encoded):
        body = encoded[start + 4 : end] if 0xE0 <= marker <= 0xEF else b""
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame header
            if width:
                raise BadImage(CORRUPT)
            height, width = struct.unpack_from(">HH", encoded, start + 5)
        if marker == 0xE1 and body.startswith(b"Exif\0\0") and orientation == 1:
            orientation = orientation_of(body)
        if marker == 0xE2 and body.startswith(b"MPF\0"):
            trailer_declared = True
        if marker == 0xE1 and any(word in body for word in _DECLARED_TRAILERS):
            trailer_declared = True
        # JFIF (0xE0) and Adobe's (0xEE) decide about colours; other metadata and comments don't.
        if not (0xE1 <= marker <= 0xED or marker in (0xEF, 0xFE)):
            kept.append(encoded[start:end])
    if not trailer_declared and encoded[end:].strip(_PADDING):
        raise BadImage(TRAILING)
    return _checked("JPEG", width, height, orientation, b"".join(kept))


def _webp(encoded: bytes) -> Header:
    (length,) = struct.unpack_from("<I", encoded, 4)
    end = 8 + length + (length & 1)
    if 8 + length > len(encoded):
        raise BadImage(TRUNCATED)
    if encoded[end:].strip(_PADDING):
        raise BadImage(TRAILING)
    kind = encoded[12:16]
    orientation = 1
    if kind == b"VP8 ":
        if encoded[23:26] != b"\x9d\x01\x2a":
            raise BadImage(CORRUPT)
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", encoded, 26))
    elif kind == b"VP8L":
        (bits,) = struct.unpack_from("<I", encoded, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"VP8X":
        canvas = encoded[24:30]
        width = int.from_bytes(canvas[:3], "little") + 1
        height = int.from_bytes(canvas[3:], "little") + 1
        position = 12
        for _ in range(MAX_PARTS):
            if position + 8 > 8 + length:
                break
            kind, size = struct.unpack_from("<4sI", encoded, position)
            if kind == b"EXIF":
                orientation = orientation_of(encoded[position + 8 : position + 8 + size])
            position += 8 + size + (size & 1)
    else:
        raise BadImage(CORRUPT)
    return _checked("WEBP", width, height, orientation, encoded)


def _gif(encoded: bytes) -> Header:
    width, height, flags = struct.unpack_from("<HHB", encoded, 6)
    position = 13 + (3 << (flags & 7) + 1 if flags & 0x80 else 0)
    in_extension = False  # before the first frame: a label, then sub-blocks up to an empty one
    for _ in range(MAX_PARTS):
        if in_extension:
            in_extension = encoded[position] != 0
            position += encoded[position] + 1
        elif encoded[position] == 0x21:
            in_extension = True
            position += 2
        else:
            break
    if in_extension or encoded[position] != 0x2C:
        raise BadImage(CORRUPT)
    left, top, frame_width, frame_height = struct.unpack_from("<HHHH", encoded, position + 1)
    # The end is judged by the trailer alone: walking thousands of frames would tell little more.
    if not encoded.rstrip(_PADDING).endswith(b";"):
        raise BadImage(TRUNCATED)
    # A frame may reach over the canvas; PIL then enlarges the picture.
    width, height = max(width, left + frame_width), max(height, top + frame_height)
    return _checked("GIF", width, height, 1, encoded)


def _checked(kind: str, width: int, height: int, orientation: int, pixels: bytes) -> Header:
    if width < 1 or height < 1:
        raise BadImage(CORRUPT)
    return Header(kind, width, height, orientation, pixels)
