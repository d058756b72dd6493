"""What LLaVA-NeXT's demo is trained on: pictures of every aspect, their tiles and their labels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

#: First seeds whose pictures differ in aspect: upright, lying, nearly square.
FIRST_SEEDS = (500, 700, 900, 1200, 1300, 1400)


def seen_colour(views: Any, pixels: torch.Tensor, view: Any, item: Any) -> np.ndarray | None:
    """The view's colour, 0 to 255, at an object's centre; None where the view doesn't show it."""
    column = (item.x - view.left) / view.width * views.SIDE
    row = (item.y - view.top) / view.height * views.SIDE
    if not (1 <= column < views.SIDE - 1 and 1 <= row < views.SIDE - 1):
        return None
    seen = pixels[:, int(row), int(column)] * views.STD + views.MEAN
    return (seen * 255).numpy()


@pytest.mark.parametrize("first_seed", FIRST_SEEDS)
def test_each_view_shows_an_object_where_its_span_says(
    training: SimpleNamespace, first_seed: int
) -> None:
    batch = training.views.tiled_batch(first_seed, 3)
    views = training.views.views_of(*batch.size)
    assert batch.pixel_values.shape[:2] == (3, len(views))
    for pixels, scene in zip(batch.pixel_values, batch.scenes, strict=True):
        for item in scene.objects:
            if item.shape == "ring":
                continue  # its centre is the background
            shown = [
                seen_colour(training.views, *seen, item) for seen in zip(pixels, views, strict=True)
            ]
            assert shown[0] is not None
            for colour in shown:
                if colour is not None:
                    np.testing.assert_allclose(colour, item.rgb, atol=45)


def test_sizes_keep_their_bounds_and_use_every_canvas(training: SimpleNamespace) -> None:
    rng = training.pictures.training_rng(0)
    sizes = [training.views.random_size(rng) for _ in range(500)]
    assert all(100 <= side <= 400 for size in sizes for side in size)
    aspects = [width / height for width, height in sizes]
    assert min(aspects) < 0.4 < 2.5 < max(aspects)
    assert min(aspects) > 0.32
    assert max(aspects) < 3.1
    canvases = set()
    for size in sizes:
        _, first, *_, last = training.views.views_of(*size)
        across = round((last.left - first.left) / first.width) + 1
        down = round((last.top - first.top) / first.height) + 1
        canvases.add((down * 96, across * 96))
    assert canvases == {tuple(canvas) for canvas in training.views.PINPOINTS}


def test_tiles_learn_only_what_a_tile_can_show(training: SimpleNamespace) -> None:
    batch = training.views.tiled_batch(1200, 2)
    views = training.views.views_of(*batch.size)
    ignored = training.tower.IGNORED
    labels, offsets = training.tiled_tower.view_labels(batch.scenes, batch.size, views)
    for name, label in labels.items():
        whole, *tiles = label.unflatten(0, (2, len(views))).unbind(1)
        assert (whole[labels["object"].unflatten(0, (2, -1))[:, 0] == 1] != ignored).any()
        in_tiles = any((tile != ignored).any() for tile in tiles)
        assert in_tiles == (name in training.tiled_tower.PARTIAL_LABELS)
    assert offsets.abs().max() <= 2
    for i, scene in enumerate(batch.scenes):
        of_whole = labels["shape"].unflatten(0, (2, -1))[i, 0]
        named = {training.pictures.SHAPES[int(k)] for k in of_whole[of_whole != ignored]}
        assert named == {item.shape for item in scene.objects}


def test_a_size_is_evaluated_without_changing_the_questions(training: SimpleNamespace) -> None:
    seed = training.pictures.EVALUATION_SEEDS_FROM
    sized = training.evaluate._picture_and_questions(seed, None, 0.0)
    square = training.evaluate._picture_and_questions(seed, 96, 0.0)
    assert sized[1] == square[1]
    assert square[0].size == (96, 96)
    assert sized[0].size != (96, 96)
