"""Scenes by the batch: drawn the ways that a picture may reach the processor, as tensors."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from pictures import Scene, draw, draw_array, random_scene, training_rng

SIDE = 96
"""Side in pixels of the square picture that the model sees."""
MEAN, STD = 0.5, 0.25
"""Per-channel normalisation after scaling to 0..1, also written to the processor's files."""
RESIZED_FROM = (80, 128, 160, 192, 256)


@dataclass(frozen=True)
class Batch:
    """Scenes, their pictures as the tower takes them, and a generator to ask questions with."""

    scenes: tuple[Scene, ...]
    pixel_values: torch.Tensor
    """``[batch, 3, SIDE, SIDE]`` float32, normalised."""
    rng: np.random.Generator


def training_batch(first_seed: int, size: int) -> Batch:
    """Return the batch of the training seeds ``first_seed`` to ``first_seed + size - 1``."""
    scenes, pictures = [], []
    for seed in range(first_seed, first_seed + size):
        rng = training_rng(seed)
        scene = random_scene(rng)
        scenes.append(scene)
        pictures.append(_as_received(scene, rng))
    return Batch(tuple(scenes), to_pixel_values(np.stack(pictures)), training_rng(first_seed))


def to_pixel_values(pictures: npt.NDArray[np.uint8]) -> torch.Tensor:
    """Return ``[batch, height, width, 3]`` bytes as the processor would return them."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float()
    return ((pixels / 255 - MEAN) / STD).contiguous()


def _as_received(scene: Scene, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """Return the picture ``[SIDE, SIDE, 3]``, one in three resized or compressed on its way."""
    way = rng.random()
    if way < 0.67:
        return draw_array(scene, SIDE, SIDE)
    side = int(rng.choice(RESIZED_FROM)) if way < 0.9 else SIDE
    picture = draw(scene, side, side)
    if way > 0.8:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(60, 96)))
        picture = Image.open(file)
    if side != SIDE:
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    return np.asarray(picture)
