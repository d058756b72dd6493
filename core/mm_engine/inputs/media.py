"""Images as they arrive, decoded within limits: URL → bytes → RGB.

One defined way for every kind of picture: the first frame; upright by its EXIF orientation; 16-bit
samples divided by 256; grey, palette and CMYK converted to RGB; what is transparent laid over
white. Colour profiles are ignored. Everything about a picture that can be refused is refused from
its header, before a pixel of any picture of the request is decoded.
"""

from __future__ import annotations

import binascii
import re
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from mm_engine.errors import RequestError
from mm_engine.inputs.image_header import CORRUPT, BadImage, Header, read_header

if TYPE_CHECKING:
    from mm_engine.inputs.local_files import MediaFolder

_MIME = {
    "image/png": "PNG",
    "image/jpeg": "JPEG",
    "image/jpg": "JPEG",
    "image/webp": "WEBP",
    "image/gif": "GIF",
}
#: What PIL's decoders raise for bytes that aren't as they should be.
_DECODER_FAULTS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    BadImage,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
    Warning,
    struct.error,
    zlib.error,
)
_DATA_URL = re.compile(r"data:([^;,]*)((?:;[^;,]*)*),", re.IGNORECASE)
_SCHEME = re.compile(r"\s*([a-z][a-z0-9+.-]*):", re.IGNORECASE)
_UPRIGHT = {  # how a picture with this EXIF orientation is turned upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True, slots=True)
class MediaLimits:
    """What the images of one request may amount to."""

    max_images: int = 8
    max_bytes: int = 10 * 2**20  # of one image, encoded
    max_total_bytes: int = 32 * 2**20  # of all images of a request, encoded
    max_pixels: int = 32_000_000  # of one image, by its header
    max_side: int = 65_535  # pixels, by its header; as long as a JPEG can be
    max_total_pixels: int = 64_000_000  # of all images of a request, by their headers


@dataclass(frozen=True, slots=True)
class ImageSource:
    """An image as a request names it: its URL, and the field it came in."""

    url: str
    param: str
    fetched: bytes | None = None  # what the URL led to, once that is known


class ByteBudget:
    """How many bytes the images of one request may still have, encoded."""

    def __init__(self, limits: MediaLimits) -> None:
        self._max_bytes = limits.max_total_bytes
        self._num_left = limits.max_total_bytes

    def take(self, num_bytes: int, param: str) -> None:
        """Count these bytes of the image in the field `param`.

        Raises:
            RequestError: there aren't so many left.
        """
        self._num_left -= num_bytes
        if self._num_left < 0:
            raise _bad(
                param,
                f"the images are over {self._max_bytes} bytes together. Compress them, or send"
                " fewer.",
            )


def load_images(
    sources: Sequence[ImageSource], limits: MediaLimits, folder: MediaFolder | None = None
) -> list[Image.Image]:
    """Decode a request's images, in order, each to an RGB image of its own size.

    `folder` is where file URLs may lead; without it they are refused, as are URLs of other hosts
    that nobody has fetched.

    Raises:
        RequestError: too many, too large alone or together, no URL that is taken here, or not a
            whole picture.
    """
    check_count(len(sources), limits)
    budget = ByteBudget(limits)
    headers = []
    for source in sources:
        encoded = _read(source, limits, folder)
        budget.take(len(encoded), source.param)
        headers.append(_inspect(encoded, limits, source.param))
    total = sum(header.num_pixels for header in headers)
    if total > limits.max_total_pixels:
        raise RequestError(
            f"too many pixels in one request: {total}. All images together may have"
            f" {limits.max_total_pixels}: send smaller or fewer images.",
            param=sources[-1].param,
        )
    return [_decode(header, source.param) for header, source in zip(headers, sources, strict=True)]


def check_count(num_images: int, limits: MediaLimits) -> None:
    """Refuse a request with more images than it may have.

    Raises:
        RequestError: with both numbers.
    """
    if num_images > limits.max_images:
        raise RequestError(
            f"too many images: {num_images}. This server takes at most {limits.max_images} per"
            " request (--limit-mm-per-prompt).",
            param="messages",
        )


def decode_image(
    encoded: bytes, limits: MediaLimits | None = None, *, param: str = "image"
) -> Image.Image:
    """Decode one PNG, JPEG, WebP or GIF to an upright RGB image.

    Raises:
        RequestError: over a limit, another format, truncated, corrupt, or followed by other data.
    """
    return _decode(_inspect(encoded, limits or MediaLimits(), param), param)


def to_rgb(image: Image.Image) -> Image.Image:
    """Return `image` as RGB, in the one way that the top of this file defines."""
    image.load()
    if image.mode.startswith("I"):  # 16-bit grey; PIL's own conversion would clip it
        samples = np.clip(np.asarray(image, np.int64), 0, 2**16 - 1)
        image = Image.fromarray((samples >> 8).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        layer = image.convert("RGBA")
        white = Image.new("RGBA", layer.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, layer)
    rgb = image.convert("RGB")
    rgb.info = {}
    return rgb


def read_data_url(source: ImageSource, limits: MediaLimits) -> bytes:
    """The bytes that a base64 data URL holds; its MIME type must be what the bytes are.

    Raises:
        RequestError: another kind of URL, a MIME type that isn't the data's, bad base64, too long.
    """
    found = _DATA_URL.match(source.url)
    if found is None:
        raise _other_url(source)
    mime, options = found[1].strip().lower(), found[2].lower()
    if options.rpartition(";")[2].strip() != "base64":
        raise _bad(source.param, "the data URL is not base64. Write it as data:image/png;base64,…")
    if mime not in _MIME:
        raise _bad(
            source.param,
            "the data URL's MIME type is none that is taken here. Send image/png, image/jpeg,"
            " image/webp or image/gif.",
        )
    if len(source.url) - found.end() > (limits.max_bytes + 2) // 3 * 4 * 1.05:  # 5%: line breaks
        raise too_long(limits, source.param)
    try:
        text = b"".join(source.url[found.end() :].encode("ascii").split())
        if text.endswith(b"==="):  # binascii lets surplus padding pass
            raise ValueError
        encoded = binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # of encode and of binascii
        raise _bad(
            source.param, "the data URL holds invalid base64. Encode the file anew."
        ) from None
    if encoded and (kind := _kind(encoded)) and kind != _MIME[mime]:
        raise _bad(
            source.param,
            f"the data URL says {mime} but holds {kind}. Send the MIME type of the data.",
        )
    return encoded


def scheme_of(url: str) -> str:
    """The scheme of a URL in lower case, empty if it has none."""
    found = _SCHEME.match(url)
    return found[1].lower() if found else ""


def _read(source: ImageSource, limits: MediaLimits, folder: MediaFolder | None) -> bytes:
    if source.fetched is not None:
        return source.fetched
    if folder is not None and scheme_of(source.url) == "file":
        return folder.read(source, limits)
    return read_data_url(source, limits)


def _inspect(encoded: bytes, limits: MediaLimits, param: str) -> Header:
    if not encoded:
        raise _bad(param, "the image is empty. Send a PNG, JPEG, WebP or GIF.")
    if len(encoded) > limits.max_bytes:
        raise too_long(limits, param)
    try:
        header = read_header(encoded)
    except BadImage as fault:
        raise _bad(param, f"{fault}. Send a whole PNG, JPEG, WebP or GIF.") from None
    if header.num_pixels > limits.max_pixels:
        raise _bad(
            param,
            f"the image is too large: {header.width} × {header.height} pixels. An image may have"
            f" {limits.max_pixels} pixels: scale it down.",
        )
    if max(header.width, header.height) > limits.max_side:
        raise _bad(
            param,
            f"the image is too long: {header.width} × {header.height} pixels. A side may have"
            f" {limits.max_side} pixels: scale it down.",
        )
    return header


def _decode(header: Header, param: str) -> Image.Image:
    try:
        with Image.open(BytesIO(header.pixels), formats=[header.format]) as image:
            if image.size != (header.width, header.height):
                raise BadImage(CORRUPT)
            rgb = to_rgb(image)
    except _DECODER_FAULTS:
        raise _bad(param, f"{CORRUPT}. Send a whole PNG, JPEG, WebP or GIF.") from None
    turn = _UPRIGHT.get(header.orientation)
    return rgb if turn is None else rgb.transpose(turn)


def _kind(encoded: bytes) -> str | None:
    for kind, start in (("PNG", b"\x89PNG"), ("JPEG", b"\xff\xd8"), ("GIF", b"GIF8")):
        if encoded.startswith(start):
            return kind
    return "WEBP" if encoded[8:12] == b"WEBP" else None


def _other_url(source: ImageSource) -> RequestError:
    """Say which kind of URL is not taken, without repeating the URL: it may hold secrets."""
    name = scheme_of(source.url)
    instead = "Send the image as a data URL: data:image/png;base64,…"
    if name in ("http", "https"):
        return _bad(source.param, f"remote image URLs are off: {name}://… {instead}")
    if name == "file":
        return _bad(source.param, f"local image files are off: file://… {instead}")
    if name == "data":
        return _bad(source.param, f"the data URL is incomplete. {instead}")
    return _bad(source.param, f"the image is not a URL of a known kind. {instead}")


def too_long(limits: MediaLimits, param: str) -> RequestError:
    """What an encoded image over the limit is answered with."""
    return _bad(param, f"the image is over {limits.max_bytes} bytes. Compress it or scale it down.")


def _bad(param: str, message: str) -> RequestError:
    return RequestError(message, param=param)
