"""Pictures of every kind that a plugin must count rightly: the sizes, the modes, and shrinking."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from transformers.image_processing_utils import select_best_resolution

Size = tuple[int, int]  # width and height in pixels

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "I", "F", "CMYK")
MAX_SIDE = 4000
MAX_PIXELS = 3_000_000  # of a size that isn't one of the model's own
MAX_GRIDS = 16
NUM_RANDOM = 40
NUM_ROUNDING = 40
MAX_TRIES = 500  # candidates for one grid's rounding sizes
NUM_TRIES = 80  # sizes that `shrink` looks at
ODD_SIZES: tuple[Size, ...] = (
    (1, 1), (1, 2), (2, 1), (2, 3), (1, 17), (17, 1), (1, 99), (99, 1), (1, 500), (500, 1),
    (7, 5), (13, 31), (101, 99), (333, 77), (77, 333), (2, 300), (300, 2), (1000, 10), (10, 1000),
    (1201, 799), (640, 480), (480, 640), (2, 1500), (2000, 3),
)  # fmt: skip


def picture(size: Size, seed: int = 0) -> Image.Image:
    """Return an RGB picture of noise, the same for the same size and seed."""
    rng = np.random.default_rng((seed, *size))
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def picture_of_mode(mode: str, size: Size) -> Image.Image:
    """Return a picture of noise in one of PIL's modes."""
    if mode.startswith("I"):
        samples = np.random.default_rng(0).integers(0, 2**16, (size[1], size[0]))
        dtype = np.uint16 if mode == "I;16" else np.int32
        return Image.fromarray(samples.astype(dtype))
    image = picture(size)
    if mode in ("RGBA", "LA"):
        image.putalpha(picture(size, 1).convert("L"))
    return image.convert(mode)


@dataclass(frozen=True, slots=True)
class Geometry:
    """The sizes at which a model's treatment of images may change."""

    grids: tuple[Size, ...]  # what images are fitted into
    sides: tuple[int, ...]  # sides that the tower or the image processor names
    patch: int  # pixels


def geometry(config: Any, image_processor: Any) -> Geometry:
    """Read the sizes that a config and its image processor name."""
    vision = getattr(config, "vision_config", config)
    options: Mapping[str, Any] = image_processor.to_dict() if image_processor is not None else {}
    pinpoints = getattr(config, "image_grid_pinpoints", None) or options.get("image_grid_pinpoints")
    grids = [(int(width), int(height)) for height, width in pinpoints or ()]
    sides = set(_numbers(getattr(vision, "image_size", None)))
    for name in ("size", "crop_size", "max_image_size", "min_image_size", "image_size"):
        sides |= set(_numbers(options.get(name)))
    kept = sorted(side for side in sides if 1 < side <= MAX_SIDE)
    patch = [number for number in _numbers(getattr(vision, "patch_size", None)) if number > 0]
    return Geometry(tuple(dict.fromkeys(grids)), tuple(kept), patch[0] if patch else 14)


def _numbers(value: Any) -> Iterator[int]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _numbers(inner)
    elif hasattr(value, "__dict__"):  # transformers' SizeDict
        yield from _numbers(vars(value))


def sweep(shape: Geometry, seed: int = 0) -> list[Size]:
    """Return the sizes to try: odd ones, each boundary with its neighbours, and random ones."""
    sizes = dict.fromkeys(ODD_SIZES)
    rng = random.Random(seed)
    grids = list(shape.grids)
    if len(grids) > MAX_GRIDS:
        grids = rng.sample(grids, MAX_GRIDS)
    for width, height in grids:
        near = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1))
        sizes.update(dict.fromkeys((width + dx, height + dy) for dx, dy in near))
    for side in shape.sides:
        for edge in (side, side - 1, side + 1, side - shape.patch, side + shape.patch):
            sizes.update(dict.fromkeys([(edge, edge), (edge, side), (side, edge)]))
        sizes.update(dict.fromkeys([(2 * side, side), (side, 2 * side + 1), (side * 3, side - 1)]))
    for grid in grids:
        num_each = max(1, NUM_ROUNDING // (2 * len(grids)))
        sizes.update(dict.fromkeys(rounding_sizes(grid, shape, num_each)))
    for _ in range(NUM_RANDOM):
        width = int(2 ** rng.uniform(0, 10.5))
        sizes[width, max(1, int(width * 2 ** rng.uniform(-2.5, 2.5)))] = None
    return [size for size in sizes if _is_sane(size, shape)]


def _is_sane(size: Size, shape: Geometry) -> bool:
    width, height = size
    fits = 1 <= width <= MAX_SIDE and 1 <= height <= MAX_SIDE
    return fits and (width * height <= MAX_PIXELS or size in shape.grids)


def rounding_sizes(grid: Size, shape: Geometry, num_each: int) -> list[Size]:
    """Return sizes that, scaled to fill `grid`, come to whole patches or pixels only by rounding.

    With their aspect kept, `height * (grid_width / width)` is a whole number, but in floating
    point it falls just short of it: `int` and `round` differ there. `num_each` for each of both
    orientations, in patches; one in pixels.
    """
    found: list[Size] = []
    pinpoints = [[height, width] for width, height in shape.grids]
    for flip in (False, True):
        across, along = (grid[1], grid[0]) if flip else grid
        tile = next((side for side in reversed(shape.sides) if across % side == 0), across)
        patches = across // tile * (tile // shape.patch)
        long = np.arange(max(1, across // 4), 2 * across + 1, dtype=np.float64)[:, None]
        short = np.arange(1, 2 * along + 1, dtype=np.float64)[None, :]
        for unit, number in ((patches, num_each), (across, 1)):
            scaled = short * (unit / long)
            whole = np.rint(scaled)
            cut = (np.abs(scaled - whole) < 1e-9) & (scaled < whole)
            cut &= short * across < long * along
            # Padding is halved: where it is odd, one patch less of the picture makes it more.
            cut &= (unit - whole) % 2 == 1
            places = np.random.default_rng(0).permutation(np.argwhere(cut))
            taken: dict[int, Size] = {}  # by the number of patches
            for i, j in places[:MAX_TRIES]:
                size = (int(long[i, 0]), int(short[0, j]))
                size = (size[1], size[0]) if flip else size
                if len(taken) == number:
                    break
                best = select_best_resolution((size[1], size[0]), pinpoints)
                if int(whole[i, j]) not in taken and tuple(best) == (grid[1], grid[0]):
                    taken[int(whole[i, j])] = size
            found += taken.values()
    return found


def shrink(size: Size, fails: Callable[[Size], bool]) -> Size:
    """Return the smallest size found that still fails, starting from one that does."""
    tried = {size}
    best, improved = size, True
    while improved and len(tried) < NUM_TRIES:
        improved = False
        for candidate in _smaller(best):
            if candidate in tried or len(tried) >= NUM_TRIES:
                continue
            tried.add(candidate)
            if fails(candidate):
                best, improved = candidate, True
                break
    return best


def _smaller(size: Size) -> Iterator[Size]:
    width, height = size
    yield from ((1, 1), (1, height), (width, 1), (width // 2 or 1, height // 2 or 1))
    for part in (2, 4, 8, 16):
        yield (max(1, width - max(1, width // part)), height)
        yield (width, max(1, height - max(1, height // part)))
    yield from ((max(1, width - 1), height), (width, max(1, height - 1)))
