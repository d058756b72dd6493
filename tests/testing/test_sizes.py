"""The sizes that counts are tried at, the modes of pictures, and shrinking."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaNextConfig, LlavaNextImageProcessorPil

from mm_engine.testing.sizes import (
    MAX_PIXELS,
    MAX_SIDE,
    MODES,
    Geometry,
    geometry,
    picture,
    picture_of_mode,
    rounding_sizes,
    shrink,
    sweep,
)

GRIDS = ((672, 336), (336, 672), (672, 672), (336, 1008), (1008, 336))
PUBLISHED = Geometry(GRIDS, (336,), 14)
SIDES = st.integers(1, MAX_SIDE)


def test_geometry_is_read_from_config_and_processor() -> None:
    config = LlavaNextConfig(image_grid_pinpoints=[[336, 672], [672, 336]])
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 224}, crop_size={"height": 200, "width": 180}
    )
    found = geometry(config, processor)
    assert found.grids == ((672, 336), (336, 672))  # width first
    assert found.sides == (180, 200, 224, 336)
    assert found.patch == 14


def test_sweep_has_strips_odd_sides_and_every_boundary() -> None:
    sizes = set(sweep(PUBLISHED))
    assert {(1, 1), (1, 500), (500, 1), (7, 5), (2, 1500)} <= sizes
    for width, height in GRIDS:
        assert {(width + x, height) for x in (-1, 0, 1)} <= sizes
        assert {(width, height + y) for y in (-1, 0, 1)} <= sizes
    assert {(335, 335), (336, 336), (337, 337), (322, 322), (350, 350)} <= sizes


def test_sweep_is_the_same_each_time_and_another_for_another_seed() -> None:
    assert sweep(PUBLISHED) == sweep(PUBLISHED)
    assert sweep(PUBLISHED) != sweep(PUBLISHED, seed=1)
    assert len(sweep(PUBLISHED)) == len(set(sweep(PUBLISHED)))


def test_many_grids_do_not_make_the_sweep_endless() -> None:
    grids = tuple((56 * w, 56 * h) for w in range(1, 7) for h in range(1, 7))
    assert len(sweep(Geometry(grids, (56,), 14))) < 300


def test_pictures_that_take_long_are_left_out_unless_the_model_names_them() -> None:
    large = (3000, 1500)
    assert large[0] * large[1] > MAX_PIXELS
    found = sweep(Geometry((large,), (1500,), 14))
    assert large in found
    assert all(width * height <= MAX_PIXELS for width, height in found if (width, height) != large)
    assert (1500, 1500) in found and (2 * 1500, 1500 + 1) not in found


def test_rounding_sizes_tell_int_from_round() -> None:
    found = [size for grid in GRIDS for size in rounding_sizes(grid, PUBLISHED, 4)]
    assert len(found) >= 15
    differ = 0
    for width, height in found:
        scaled = [short * (unit / long) for short, long in ((height, width), (width, height))
                  for unit in (24, 48, 72, 336, 672, 1008)]  # fmt: skip
        differ += any(
            int(value) != int(round(value, 7)) and math.isclose(value, round(value))
            for value in scaled
        )
    assert differ == len(found)


@given(SIDES, SIDES, SIDES, SIDES)
def test_shrinking_finds_the_corner_of_a_region(w: int, h: int, low_w: int, low_h: int) -> None:
    def fails(size: tuple[int, int]) -> bool:
        return size[0] >= low_w and size[1] >= low_h

    start = (max(w, low_w), max(h, low_h))
    found = shrink(start, fails)
    assert fails(found)
    assert found[0] * found[1] <= start[0] * start[1]
    # 80 tries find it to within a few percent of each side, or to the pixel for a small one.
    assert found[0] <= max(low_w + 4, 1.25 * low_w)
    assert found[1] <= max(low_h + 4, 1.25 * low_h)


def test_shrinking_takes_1x1_first() -> None:
    tried: list[tuple[int, int]] = []
    assert shrink((900, 700), lambda size: tried.append(size) or True) == (1, 1)  # type: ignore[func-returns-value]
    assert tried == [(1, 1)]


def test_shrinking_keeps_what_nothing_smaller_fails() -> None:
    assert shrink((47, 188), lambda size: size == (47, 188)) == (47, 188)


@pytest.mark.parametrize("mode", MODES)
def test_pictures_come_in_every_mode(mode: str) -> None:
    image = picture_of_mode(mode, (9, 7))
    assert (image.mode, image.size) == (mode, (9, 7))
    assert len(np.unique(np.asarray(image))) > 1


def test_pictures_differ_by_seed_and_are_reproducible() -> None:
    assert picture((5, 4)).tobytes() == picture((5, 4)).tobytes()
    assert picture((5, 4)).tobytes() != picture((5, 4), 1).tobytes()
