"""How many tokens an image takes: the one formula, for every hook that needs it."""

from __future__ import annotations

from typing import Any


def num_image_tokens(config: Any, num_pictures: int, side: int) -> int:
    """Rows that `embed_images` makes of an image that became so many pictures, `side` pixels wide.

    The markers before and after them are text and don't count.
    Source: `InternVLModel.get_image_features` and `pixel_shuffle` in transformers.
    """
    rows, columns = (int(n * config.downsample_ratio) for n in grid_of_patches(config, side))
    return num_pictures * rows * columns


def grid_of_patches(config: Any, side: int) -> tuple[int, int]:
    """Rows and columns of the patches that the tower makes of a picture `side` pixels wide."""
    patch_height, patch_width = config.vision_config.patch_size
    return side // patch_height, side // patch_width


def max_pictures(min_tiles: int, max_tiles: int) -> int:
    """The most pictures that an image becomes: its tiles, and all of it small beside several.

    An image `max_tiles` times as wide as high becomes that many; one tile if no grid is allowed.
    Source: `crop_image_to_patches` of transformers' GOT-OCR2, whose image processor InternVL has.
    """
    return max_tiles + 1 if max_tiles >= max(min_tiles, 2) else 1
