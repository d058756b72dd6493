"""How an image is laid out in tiles, and so how many tokens it takes: the one formula."""

from __future__ import annotations

import reprlib
from typing import Any, NamedTuple

from mm_engine.models import num_tower_rows
from mm_engine.plugins import StartupError
from transformers.image_processing_utils import select_best_resolution

#: Far above what models have (granite-vision: 27 pinpoints of up to 10 tiles). The costliest size
#: is found by going through all pairs of pinpoints.
MAX_PINPOINTS = 256
MAX_TILES = 256  # of one pinpoint


class Layout(NamedTuple):
    """What the tower sees of an image, and which of the tiles' patches aren't padding."""

    side: int  # patches along the side of a tile, and of the whole image scaled to one
    rows: int  # of tiles
    columns: int
    top: int  # rows of patches above the first that is kept
    left: int  # columns of patches before the first that is kept
    height: int  # rows of patches that are kept
    width: int  # columns of patches that are kept

    @property
    def num_tokens(self) -> int:
        """The whole image's patches, then the tiles' row by row, a newline after each row."""
        return self.side**2 + self.height * (self.width + 1)


def layout(config: Any, height: int, width: int) -> Layout:
    """The layout of an image of `height` by `width` pixels.

    Source: `LlavaNextModel.pack_image_features` in transformers, with `select_best_resolution`
    and `unpad_image`. Its floating-point steps and the rounding to 7 places are kept as they are:
    they decide the count of some sizes.
    """
    vision = config.vision_config
    side: int = vision.image_size // vision.patch_size
    best_height, best_width = select_best_resolution((height, width), config.image_grid_pinpoints)
    rows, columns = best_height // vision.image_size, best_width // vision.image_size
    full_height, full_width = rows * side, columns * side
    top = left = 0
    if width / height > full_width / full_height:
        top = (full_height - int(round(height * (full_width / width), 7))) // 2
    else:
        left = (full_width - int(round(width * (full_height / height), 7))) // 2
    return Layout(side, rows, columns, top, left, full_height - 2 * top, full_width - 2 * left)


def largest_size(config: Any) -> tuple[int, int]:
    """Height and width of an image that takes as many tokens as any can.

    An image of a pinpoint's own size fills all of its tiles, so it is one of the pinpoints.

    Raises:
        StartupError: the config is one whose features can't be laid out.
    """
    check(config)
    sizes = [(int(height), int(width)) for height, width in config.image_grid_pinpoints]
    return max(sizes, key=lambda size: layout(config, *size).num_tokens)


def check(config: Any) -> None:
    """Refuse a config with which `LlavaNextModel.pack_image_features` fails in transformers.

    Raises:
        StartupError: a tile's features don't make a square, tiles don't fill a pinpoint, or there
            are more of either than any model has.
    """
    vision, strategy = config.vision_config, config.vision_feature_select_strategy
    num_rows, side = num_tower_rows(vision, strategy), vision.image_size // vision.patch_size
    if num_rows != side**2:
        raise StartupError(
            f"features of a tile can't be laid out: {num_rows} rows for {side} x {side} patches "
            f"({vision.model_type}, strategy {strategy}). Set vision_feature_select_strategy to "
            f"{'default' if strategy == 'full' else 'full'} in config.json."
        )
    _check_pinpoints(config.image_grid_pinpoints, vision.image_size)


def _check_pinpoints(pinpoints: Any, unit: int) -> None:
    if not isinstance(pinpoints, list | tuple):
        pinpoints = [pinpoints]
    if len(pinpoints) > MAX_PINPOINTS:
        raise StartupError(
            f"image_grid_pinpoints are too many: {len(pinpoints)}. "
            f"Give at most {MAX_PINPOINTS} in config.json."
        )
    for size in pinpoints:
        pair = isinstance(size, list | tuple) and len(size) == 2
        if not pair or any(type(length) is not int for length in size):
            raise StartupError(
                f"image_grid_pinpoints must be pairs of whole numbers: got {reprlib.repr(size)}. "
                "Correct them in config.json."
            )
    bad = [size for size in pinpoints if any(length < 1 or length % unit for length in size)]
    if bad or not pinpoints:
        raise StartupError(
            f"image_grid_pinpoints can't be cut into tiles: {bad[0] if bad else pinpoints}. "
            f"Give heights and widths in config.json that are multiples of {unit} pixels."
        )
    for height, width in pinpoints:
        num_tiles = height // unit * (width // unit)
        if num_tiles > MAX_TILES:
            raise StartupError(
                f"image_grid_pinpoints cut an image into too many tiles: {height} x {width} pixels "
                f"into {num_tiles} of {unit} pixels. Give at most {MAX_TILES} tiles in config.json."
            )
