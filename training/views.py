"""Pictures of every size and aspect as LLaVA-NeXT sees them: a squeezed whole, then tiles.

A batch holds pictures of one size, so that each has as many tiles and tokens as the others. The
views come from the image processor of transformers itself.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from transformers import LlavaNextImageProcessorPil
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension

from batches import MEAN, SIDE, STD
from pictures import Scene, draw, random_scene, training_rng

PINPOINTS = [[96, 192], [192, 96], [192, 192], [96, 288], [288, 96]]
"""Canvases that a picture may be tiled on, as (height, width); the best fit is taken."""
MIN_SIDE, MAX_SIDE, MAX_ASPECT = 100, 400, 3.0
EXACT_ASPECTS, EXACT_SHARE = (1.0, 2.0, 3.0), 0.2
"""Ratios that pictures often have, and how often they do here: the canvases of two tiles fit
pictures of 2:1 alone, as any other fills more of a larger canvas."""
COMPRESSED_SHARE = 0.15
"""Share of the training pictures that were JPEG files on their way."""


@dataclass(frozen=True)
class View:
    """What one view of a picture spans, in fractions of the picture's width and height.

    A tile may span more than the picture: its canvas is padded.
    """

    left: float
    top: float
    width: float
    height: float


WHOLE = View(0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class TiledBatch:
    """Scenes drawn at one size, their views, and a generator to ask questions with."""

    scenes: tuple[Scene, ...]
    size: tuple[int, int]
    """Width and height of every picture, in pixels."""
    pixel_values: torch.Tensor
    """``[batch, views, 3, SIDE, SIDE]`` float32, normalised; the whole picture comes first."""
    rng: np.random.Generator


def make_image_processor() -> LlavaNextImageProcessorPil:
    """Return the image steps of LLaVA-NeXT for tiles of ``SIDE`` pixels."""
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=[MEAN] * 3,
        image_std=[STD] * 3,
        image_grid_pinpoints=PINPOINTS,
    )


def random_size(rng: np.random.Generator) -> tuple[int, int]:
    """Return a width and a height from 100 to 400, their ratio between 1:3 and 3:1."""
    if rng.random() < EXACT_SHARE:
        aspect = EXACT_ASPECTS[int(rng.integers(len(EXACT_ASPECTS)))]
    else:
        aspect = float(np.exp(rng.uniform(0, np.log(MAX_ASPECT))))
    shorter = int(rng.uniform(MIN_SIDE, MAX_SIDE / aspect))
    sides = shorter, round(shorter * aspect)
    return sides if rng.random() < 0.5 else (sides[1], sides[0])


def tiled_batch(first_seed: int, size: int) -> TiledBatch:
    """Return the batch of the training seeds ``first_seed`` to ``first_seed + size - 1``.

    The first seed also says how large all the pictures are.
    """
    (rng,) = training_rng(first_seed).spawn(1)
    width, height = random_size(rng)
    scenes, pictures = [], []
    for seed in range(first_seed, first_seed + size):
        of_picture = training_rng(seed)
        scene = random_scene(of_picture)
        picture = draw(scene, width, height)
        if of_picture.random() < COMPRESSED_SHARE:
            file = io.BytesIO()
            picture.save(file, "JPEG", quality=int(of_picture.integers(60, 96)))
            picture = Image.open(file)
        scenes.append(scene)
        pictures.append(picture)
    views = make_image_processor()(pictures, return_tensors="pt")["pixel_values"]
    return TiledBatch(tuple(scenes), (width, height), views, rng)


def views_of(width: int, height: int) -> tuple[View, ...]:
    """Return what the views of a picture span, in the order of ``TiledBatch.pixel_values``."""
    canvas = select_best_resolution((height, width), PINPOINTS)
    resized = get_patch_output_size(
        np.empty((3, height, width), dtype=np.uint8), canvas, ChannelDimension.FIRST
    )
    above, before = ((canvas[i] - resized[i]) // 2 for i in (0, 1))
    tiles = [
        View(
            left=(x - before) / resized[1],
            top=(y - above) / resized[0],
            width=SIDE / resized[1],
            height=SIDE / resized[0],
        )
        for y in range(0, canvas[0], SIDE)
        for x in range(0, canvas[1], SIDE)
    ]
    return (WHOLE, *tiles)
