"""The tower's second school: the squeezed whole of a picture of any aspect, and its tiles.

The labels are those of ``tower.py``. Every patch of the whole picture learns all of them. A tile
sees a part of the picture at a scale that it cannot know, so its patches learn only the shape and
the colour, and only those of objects whose centre the tile shows.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from tqdm import trange
from transformers import CLIPVisionModel

from batches import SIDE
from optim import Optimizers
from pictures import COLOURS, MIN_SEPARATION, SHAPES, SIZES, Scene
from tower import GRID, IGNORED, LABELS, PATCH, PatchHeads
from views import WHOLE, View, tiled_batch, views_of

PARTIAL_LABELS = ("object", "shape", "colour")
"""What the patches of a tile learn."""
_CENTRES = (np.arange(GRID) + 0.5) / GRID


def view_labels(
    scenes: tuple[Scene, ...], size: tuple[int, int], views: tuple[View, ...]
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the labels and offsets of every view of every scene, scene by scene.

    The labels are ``[scenes * views, patches]`` and the offsets ``[scenes * views, patches, 2]``,
    as ``tower.patch_labels`` has them, for pictures of ``size`` = (width, height).
    """
    shape = (len(scenes), len(views), GRID, GRID)
    labels = {name: np.full(shape, IGNORED, dtype=np.int64) for name in LABELS}
    labels["object"][:] = 0
    offsets = np.zeros((*shape, 2), dtype=np.float32)
    for i, scene in enumerate(scenes):
        for j, view in enumerate(views):
            row = {name: label[i, j] for name, label in labels.items()}
            _label(scene, size, view, row, offsets[i, j])
    flat = {
        name: torch.from_numpy(label.reshape(-1, GRID * GRID)) for name, label in labels.items()
    }
    return flat, torch.from_numpy(offsets.reshape(-1, GRID * GRID, 2))


def _label(
    scene: Scene,
    size: tuple[int, int],
    view: View,
    labels: dict[str, np.ndarray],
    offsets: np.ndarray,
) -> None:
    """Write one view's labels, each ``[GRID, GRID]``, and offsets ``[GRID, GRID, 2]``."""
    shorter = min(size)
    scale_x = SIDE * shorter / (size[0] * view.width)  # the view's pixels in one shorter side
    scale_y = SIDE * shorter / (size[1] * view.height)
    heights = sorted(item.y for item in scene.objects)
    clear = min(np.diff(heights), default=1.0) >= 0.5 * MIN_SEPARATION
    for rank, item in enumerate(scene.objects):
        centre_x, centre_y = (item.x - view.left) / view.width, (item.y - view.top) / view.height
        x = (_CENTRES[None, :] - centre_x) * SIDE
        y = (_CENTRES[:, None] - centre_y) * SIDE
        wide, high = item.radius * scale_x, item.radius * scale_y
        inside = np.hypot(x / (0.8 * wide + 2), y / (0.8 * high + 2)) < 1
        inside |= np.maximum(abs(x), abs(y)) <= PATCH / 2  # however thin the object
        labels["object"][np.hypot(x / (wide + 6), y / (high + 6)) < 1] = IGNORED
        labels["object"][inside] = 1
        values = {
            "shape": SHAPES.index(item.shape),
            "colour": list(COLOURS).index(item.colour),
            "size": SIZES.index(item.size),
            "rank_x": rank,
            "rank_y": heights.index(item.y) if clear else IGNORED,
            "count": len(scene.objects) - 1,
            "count_colour": sum(o.colour == item.colour for o in scene.objects) - 1,
        }
        whole = view is WHOLE
        shown = 0 <= centre_x <= 1 and 0 <= centre_y <= 1
        for name, value in values.items():
            known = shown and (whole or name in PARTIAL_LABELS)
            labels[name][inside] = value if known else IGNORED
        towards = -np.stack(np.broadcast_arrays(x / wide, y / high), -1)
        offsets[inside] = towards[inside].clip(-2, 2)


def train_tiled_tower(
    tower: CLIPVisionModel,
    heads: PatchHeads,
    *,
    num_steps: int,
    num_wholes: int,
    num_tiled: int,
    rate: float,
    first_seed: int,
    on_report: Callable[[int], None],
) -> None:
    """Train tower and heads in place; ``on_report`` is called with the step at each report.

    A step sees ``num_wholes`` whole pictures and the tiles of the first ``num_tiled`` of them.
    """
    optimizers = Optimizers([tower], [heads], rate=rate, num_steps=num_steps)
    bar = trange(num_steps, desc="tiled tower", mininterval=5)
    for step in bar:
        batch = tiled_batch(first_seed + step * num_wholes, num_wholes)
        tiles = views_of(*batch.size)[1:]
        shown = torch.cat(
            [batch.pixel_values[:, 0], batch.pixel_values[:num_tiled, 1:].flatten(0, 1)]
        )
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(shown).last_hidden_state[:, 1:]
            labels = view_labels(batch.scenes, batch.size, (WHOLE,))
            whole_loss, right = heads(features[:num_wholes], *labels)
            labels = view_labels(batch.scenes[:num_tiled], batch.size, tiles)
            tile_loss, right_in_tiles = heads(features[num_wholes:], *labels)
        (whole_loss + tile_loss).backward()
        optimizers.step()
        if step % 50 == 49:
            shares = [f"{name} {value:.2f}" for name, value in right.items()]
            shares += [f"{name} {right_in_tiles[name]:.2f}" for name in PARTIAL_LABELS]
            bar.write(
                f"tower step {step + 1}: {batch.size[0]}x{batch.size[1]}"
                f" loss {whole_loss.item():.3f} {' '.join(shares[: len(right)])}"
                f" tiles {tile_loss.item():.3f} {' '.join(shares[len(right) :])}"
            )
            on_report(step + 1)
