"""Images from strangers: every bytes string is an RGB image or a RequestError, within limits."""

import struct
import tracemalloc
import zlib
from collections.abc import Callable
from io import BytesIO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageSequence

from mm_engine.errors import RequestError
from mm_engine.inputs.media import MediaLimits, decode_image, to_rgb
from pictures import encode, png_chunk, png_of_size, quarters

FORMATS = ("PNG", "JPEG", "WEBP", "GIF")


@pytest.mark.parametrize("kind", FORMATS)
def test_each_format_becomes_rgb_of_its_own_size(kind: str) -> None:
    image = decode_image(encode(quarters(), kind, **({"quality": 95} if kind != "GIF" else {})))
    assert (image.mode, image.size) == ("RGB", (24, 16))
    difference = np.abs(np.asarray(image, int) - np.asarray(quarters(), int))
    assert difference.mean() < 12


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)], ids=str)
def test_extreme_sizes_are_decoded(size: tuple[int, int]) -> None:
    assert decode_image(encode(Image.new("RGB", size, "red"))).size == size


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_gives_the_pixels_of_a_transposed_original(
    kind: str, orientation: int
) -> None:
    turns = [None, None, *(Image.Transpose(t) for t in (0, 3, 1, 5, 4, 6, 2))]
    turn = turns[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"quality": 100, "subsampling": 0} if kind == "JPEG" else {"lossless": True}
    plain = decode_image(encode(quarters(), kind, **options))
    turned = decode_image(encode(quarters(), kind, exif=exif, **options))
    expected = plain if turn is None else plain.transpose(turn)
    assert turned.size == expected.size
    assert np.array_equal(np.asarray(turned), np.asarray(expected))


def test_transparent_pixels_lie_over_white() -> None:
    image = Image.new("RGBA", (2, 1), (200, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 0))
    for encoded in (encode(image), encode(image, "WEBP", lossless=True), encode(image, "GIF")):
        decoded = decode_image(encoded)
        assert decoded.getpixel((0, 0)) == pytest.approx((200, 0, 0), abs=4)
        assert decoded.getpixel((1, 0)) == (255, 255, 255)


def test_half_transparent_pixels_are_mixed_with_white() -> None:
    half = Image.new("RGBA", (1, 1), (0, 0, 0, 128))
    assert decode_image(encode(half)).getpixel((0, 0)) == (127, 127, 127)


def test_16_bit_grey_is_scaled_and_not_clipped() -> None:
    samples = np.array([[0, 256, 32768, 65535]], np.uint16)
    decoded = np.asarray(decode_image(encode(Image.fromarray(samples))))
    assert decoded[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_png_mode_gives_the_colours_that_were_drawn(mode: str) -> None:
    drawn = quarters().convert("L") if mode in ("1", "L", "LA") else quarters().quantize(16)
    drawn = drawn.convert("RGB" if mode == "RGBA" else mode).convert(mode)
    decoded = decode_image(encode(drawn))
    assert np.array_equal(np.asarray(decoded), np.asarray(drawn.convert("RGB")))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "F"])
def test_an_image_made_in_python_of_any_mode_becomes_rgb(mode: str) -> None:
    grey = Image.new("RGB", (3, 2), (200, 200, 200))
    image = to_rgb(grey.convert("L" if mode == "F" else "RGB").convert(mode))
    assert (image.mode, image.size) == ("RGB", (3, 2))
    assert image.getpixel((1, 1)) == pytest.approx((200, 200, 200), abs=5)


def test_32_bit_grey_is_taken_as_16_bit() -> None:
    samples = np.array([[-5, 256, 65535, 2**20]], np.int32)
    assert np.asarray(to_rgb(Image.fromarray(samples)))[0, :, 0].tolist() == [0, 1, 255, 255]


def test_cmyk_jpeg_becomes_rgb() -> None:
    decoded = decode_image(encode(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"))
    assert decoded.getpixel((4, 4)) == pytest.approx((255, 0, 0), abs=4)


def test_palette_with_transparent_index_lies_over_white() -> None:
    image = quarters().quantize(4)
    encoded = encode(image, transparency=image.getpixel((0, 0)))
    assert decode_image(encoded).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_only_the_first_frame_of_an_animation_is_seen(kind: str) -> None:
    frames = [Image.new("RGB", (8, 8), (200, n % 256, n // 256)) for n in range(1000)]
    encoded = encode(
        frames[0], kind, save_all=True, append_images=frames[1:], duration=40, lossless=True
    )
    with Image.open(BytesIO(encoded)) as opened:
        assert len(list(ImageSequence.Iterator(opened))) > 500  # the picture is what it claims
    assert decode_image(encoded).getpixel((4, 4)) == pytest.approx((200, 0, 0), abs=4)


def test_a_header_that_declares_too_many_pixels_is_refused_without_allocating() -> None:
    bombs = [
        png_of_size(20_000, 20_000),
        png_of_size(2**31 - 1, 2**31 - 1),
        _resized_jpeg(65_000, 65_000),
        _resized_gif(60_000, 60_000),
        _gif_with_frame_beyond_its_canvas(60_000, 60_000),
        _webp_of_size(16_000, 16_000),
    ]
    tracemalloc.start()
    try:
        for bomb in bombs:
            with pytest.raises(RequestError, match=r"too large: \d+ × \d+ pixels") as raised:
                decode_image(bomb)
            assert raised.value.status == 400
        assert tracemalloc.get_traced_memory()[1] < 5e6
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("size", [(65_536, 1), (1, 65_536), (1, 31_999_999)])
def test_side_longer_than_any_jpegs_is_refused_by_the_header(size: tuple[int, int]) -> None:
    with pytest.raises(RequestError, match=r"too long: \d+ × \d+ pixels\. A side may have 65535"):
        decode_image(png_of_size(*size))


def _resized_jpeg(width: int, height: int) -> bytes:
    encoded = encode(quarters(), "JPEG")
    start = encoded.index(b"\xff\xc0")
    return encoded[: start + 5] + struct.pack(">HH", height, width) + encoded[start + 9 :]


def _resized_gif(width: int, height: int) -> bytes:
    encoded = encode(quarters(), "GIF")
    return encoded[:6] + struct.pack("<HH", width, height) + encoded[10:]


def _gif_with_frame_beyond_its_canvas(width: int, height: int) -> bytes:
    encoded = encode(quarters(), "GIF")
    start = encoded.index(b"\x2c" + struct.pack("<HHHH", 0, 0, 24, 16))
    return encoded[: start + 1] + struct.pack("<HHHH", width, height, 24, 16) + encoded[start + 9 :]


def _webp_of_size(width: int, height: int) -> bytes:
    canvas = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + b"\x10\0\0\0" + canvas
    return b"RIFF" + struct.pack("<I", len(body)) + body


@pytest.mark.parametrize("kind", FORMATS)
def test_truncated_pictures_are_refused_at_every_length(kind: str) -> None:
    encoded = encode(quarters(), kind)
    decode_image(encoded)
    for length in range(len(encoded) - 1):
        with pytest.raises(RequestError):
            decode_image(encoded[:length])


@pytest.mark.parametrize("kind", FORMATS)
def test_data_after_the_end_is_refused_and_padding_is_not(kind: str) -> None:
    encoded = encode(quarters(), kind)
    decode_image(encoded + b"\0\0\n")
    with pytest.raises(RequestError, match="after the end|cut off"):
        decode_image(encoded + b"<?php ?>")


def test_a_jpeg_that_declares_a_second_picture_keeps_its_first() -> None:
    first = encode(quarters(), "MPO", save_all=True, append_images=[Image.new("RGB", (24, 16))])
    assert decode_image(first).getpixel((2, 2)) == pytest.approx((250, 10, 10), abs=12)


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"\0",
        b"hello",
        b"%PDF-1.7",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        encode(quarters(), "BMP"),
        encode(quarters(), "TIFF"),
        encode(quarters(), "ICO"),
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        b"\xff\xd8\xff" + b"\xff" * 1000,
        b"RIFF\x04\0\0\0WEBP",
        b"GIF89a",
        png_of_size(0, 5),
        png_of_size(500, 500),
    ],
    ids=lambda encoded: repr(encoded[:12]),
)
def test_what_is_no_picture_is_refused(encoded: bytes) -> None:
    with pytest.raises(RequestError) as raised:
        decode_image(encoded, param="messages.0.content.1")
    assert raised.value.param == "messages.0.content.1"
    assert "PNG, JPEG, WebP or GIF" in str(raised.value)


def test_text_and_animation_chunks_of_a_png_are_never_parsed() -> None:
    bomb = png_chunk(b"zTXt", b"k\0\0" + zlib.compress(b"a" * 80_000_000, 9))
    animation = png_chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0))
    encoded = encode(quarters())
    ihdr_end = 8 + 25
    decode_image(encoded[:ihdr_end] + bomb + animation + encoded[ihdr_end:])


def test_an_encoded_image_over_the_limit_is_refused() -> None:
    encoded = encode(quarters())
    limits = MediaLimits(max_bytes=len(encoded))
    decode_image(encoded, limits)
    with pytest.raises(RequestError, match="over .* bytes"):
        decode_image(encoded + b"\0", limits)


def _decodes_or_is_refused(encoded: bytes) -> None:
    try:
        image = decode_image(encoded, MediaLimits(max_pixels=100_000))
    except RequestError:
        return
    assert image.mode == "RGB"
    assert 1 <= image.width * image.height <= 100_000


SEEDS = [
    *(encode(quarters(), kind) for kind in FORMATS),
    encode(quarters().convert("CMYK"), "JPEG", progressive=True),
    encode(quarters().quantize(8), "PNG", transparency=1),
    encode(quarters().convert("RGBA"), "WEBP", lossless=True),
    encode(quarters(), "WEBP", save_all=True, append_images=[Image.new("RGB", (24, 16))]),
    encode(quarters(), "GIF", save_all=True, append_images=[Image.new("RGB", (24, 16))]),
]
Edit = tuple[int, bytes, int]
edits = st.lists(
    st.tuples(st.integers(0, 2000), st.binary(max_size=4), st.integers(0, 4)),
    min_size=1,
    max_size=6,
)


@pytest.mark.parametrize("seed", SEEDS, ids=lambda seed: repr(seed[:4]))
@settings(max_examples=200)
@given(changes=edits)
def test_mutated_pictures_decode_or_are_refused(seed: bytes, changes: list[Edit]) -> None:
    for position, insert, num_removed in changes:
        start = position % len(seed)
        seed = seed[:start] + insert + seed[start + num_removed :]
    _decodes_or_is_refused(seed)


@settings(max_examples=100)
@given(tail=st.binary(max_size=200), start=st.sampled_from([seed[:16] for seed in SEEDS] + [b""]))
def test_random_bytes_decode_or_are_refused(tail: bytes, start: bytes) -> None:
    _decodes_or_is_refused(start + tail)


def _png_of_empty_chunks(count: int) -> bytes:
    return png_of_size(4, 4, extra=png_chunk(b"teSt", b"") * count)


def _jpeg_of_scans(count: int) -> bytes:
    encoded = encode(quarters(), "JPEG")
    scan = encoded.index(b"\xff\xda")
    (length,) = struct.unpack_from(">H", encoded, scan + 2)
    return encoded[:scan] + encoded[scan : scan + 2 + length] * count + encoded[scan:]


@pytest.mark.parametrize(
    "build",
    [
        lambda: _png_of_empty_chunks(800_000),
        lambda: _jpeg_of_scans(500),
        lambda: b"\xff\xd8\xff\xe0\x00\x02" + b"\xff\xfe\x00\x02" * 2_000_000 + b"\xff\xd9",
        lambda: encode(quarters(), "GIF")[:13] + b"\x21\xfe" + b"\x01a" * 4_000_000 + b"\0;",
    ],
    ids=["png chunks", "jpeg scans", "jpeg segments", "gif sub-blocks"],
)
def test_files_of_endless_small_parts_are_refused_at_once(build: Callable[[], bytes]) -> None:
    with pytest.raises(RequestError):
        decode_image(build())
