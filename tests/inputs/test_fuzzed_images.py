"""Ten thousand damaged files of each format: a picture as its header says, or a `RequestError`.

Each format is decoded in a process of its own, which a crash or a hang would end, and whose memory
is measured. `MM_ENGINE_FUZZED_IMAGES` is another number of files, `MM_ENGINE_FUZZ_SEED` others.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm_engine.errors import RequestError
from mm_engine.inputs.image_header import read_header
from mm_engine.inputs.media import MediaLimits, decode_image
from pictures import encode, quarters

NUM_FILES = int(os.environ.get("MM_ENGINE_FUZZED_IMAGES", "10000"))
SEED = os.environ.get("MM_ENGINE_FUZZ_SEED", "1")
LIMITS = MediaLimits(max_pixels=1_000_000)
MAX_SECONDS = 10  # for one file; the machine may be busy
MAX_GROWTH = 64 * 2**20  # bytes: several pictures of so many pixels
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
PNG_START = b"\x89PNG\r\n\x1a\n"
#: What fields of lengths, sizes and counts are most often not prepared for.
EXTREMES = (b"\0", b"\1", b"\x7f", b"\x80", b"\xff", b"\0\0", b"\xff\xff", b"\x7f\xff\xff\xff")


def whole_files(kind: str) -> list[bytes]:
    """Small valid files that together use much of a format."""
    image, other = quarters(), quarters(20, 30)
    grey, clear, indexed = image.convert("L"), image.convert("RGBA"), image.quantize(8)
    animated = {"save_all": True, "append_images": [other.resize(image.size), image]}
    turned = Image.Exif()
    turned[0x0112] = 6
    saved: dict[str, list[tuple[Image.Image, dict[str, Any]]]] = {
        "PNG": [
            (image, {"exif": turned}),
            (clear, {}),
            (image.convert("LA"), {}),
            (indexed, {"transparency": 1}),
            (image.convert("1"), {}),
            (grey.convert("I;16"), {}),
            (image, animated),
        ],
        "JPEG": [
            (image, {"exif": turned}),
            (image.convert("CMYK"), {"progressive": True}),
            (grey, {"optimize": True}),
            (other, {"quality": 95, "subsampling": 0, "restart_marker_blocks": 1}),
        ],
        "WEBP": [
            (image, {"exif": turned}),
            (clear, {}),
            (clear, {"lossless": True}),
            (image, animated),
        ],
        "GIF": [
            (image, {}),
            (indexed, {"transparency": 1, "interlace": 1, "comment": b"comment"}),
            (image, animated),
        ],
    }
    return [encode(drawn, kind, **options) for drawn, options in saved[kind]]


def damaged(encoded: bytes, rng: random.Random) -> bytes:
    """The file with one to four things done to it, half of them near its beginning."""
    data = bytearray(encoded)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        reach = len(data) if rng.random() < 0.5 else min(len(data), 64)
        at = rng.randrange(reach) if reach else 0
        length = rng.choice((1, 1, 2, 4, 16, 64))
        match rng.randrange(7):
            case 0 if data:  # a flipped bit
                data[at] ^= 1 << rng.randrange(8)
            case 1 if data:  # another byte
                data[at] = rng.randrange(256)
            case 2:  # an extreme in a header's field
                extreme = rng.choice(EXTREMES)
                data[at : at + len(extreme)] = extreme
            case 3:
                data[at:at] = rng.randbytes(length)
            case 4:
                del data[at : at + length]
            case 5:  # a part once more, elsewhere
                start = rng.randrange(len(data)) if data else 0
                data[at:at] = data[start : start + length]
            case 6 if rng.random() < 0.3:
                del data[rng.randrange(len(data) + 1) :]
    return resealed(bytes(data)) if rng.random() < 0.5 else bytes(data)


def resealed(encoded: bytes) -> bytes:
    """A PNG with the checksums that its chunks should have, so that more is read; others as is."""
    if not encoded.startswith(PNG_START):
        return encoded
    data, at = bytearray(encoded), len(PNG_START)
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4])
        if end + 4 > len(data):
            break
        data[end : end + 4] = zlib.crc32(data[at + 4 : end]).to_bytes(4)
        at = end + 4
    return bytes(data)


def decode(encoded: bytes) -> str:
    """What came of one file: a picture, or the sentence by which it was refused."""
    try:
        image = decode_image(encoded, LIMITS)
    except RequestError as error:
        return str(error).partition(":")[0]
    header = read_header(encoded)
    size = (header.width, header.height)
    expected = size[::-1] if header.orientation >= 5 else size
    if (image.mode, image.size) != ("RGB", expected):
        raise AssertionError(f"{image.mode} {image.size} instead of RGB {expected}")
    return "decoded"


def main(kind: str, num_files: int, seed: str) -> None:
    """Decode so many damaged files; print what came of them, and by how much memory grew."""
    rng = random.Random(f"{kind} {seed}")
    files = whole_files(kind)
    assert [decode(file) for file in files] == ["decoded"] * len(files)
    before = peak()
    outcomes: Counter[str] = Counter()
    for number in range(num_files):
        encoded = damaged(files[number % len(files)], rng)
        signal.alarm(MAX_SECONDS)  # ends the process
        try:
            outcomes[decode(encoded)] += 1
        except BaseException:
            sys.stderr.write(f"file {number}: {encoded.hex()}\n")
            raise
    signal.alarm(0)
    print(json.dumps({"outcomes": outcomes, "growth": peak() - before}))  # noqa: T201


def peak() -> int:
    """The most memory that this process has held, in bytes."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kib if sys.platform == "darwin" else kib * 1024


@pytest.mark.parametrize("kind", FORMATS)
def test_damaged_files_decode_as_their_header_says_or_are_refused(kind: str) -> None:
    """Row 3, and row 2 for headers that are among what is damaged."""
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, __file__, kind, str(NUM_FILES), SEED],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")  # no warning either
    told = json.loads(done.stdout)
    outcomes = told["outcomes"]
    assert sum(outcomes.values()) == NUM_FILES
    # The damage is neither so great that nothing gets as far as PIL, nor none at all.
    assert outcomes["decoded"] > NUM_FILES * 0.05, outcomes
    assert outcomes["the picture is corrupt. Send a whole PNG, JPEG, WebP or GIF."] > 0, outcomes
    assert NUM_FILES - outcomes["decoded"] > NUM_FILES * 0.2, outcomes
    assert told["growth"] < MAX_GROWTH, told


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
