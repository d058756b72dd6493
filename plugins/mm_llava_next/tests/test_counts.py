"""Counts are those of transformers' model and of its processor, for every size of image."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mm_engine.plugins import StartupError
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, SiglipVisionConfig
from transformers.models.llava_next import modeling_llava_next as theirs
from transformers.models.llava_next.processing_llava_next import LlavaNextProcessor

from mm_llava_next import counts
from mm_llava_next.counts import Layout, check, largest_size, layout

LONGEST = 4000  # pixels


def grids(side: int, *shapes: tuple[int, int]) -> list[list[int]]:
    return [[rows * side, columns * side] for rows, columns in shapes]


DEFAULT = ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))
CUSTOM = ((1, 1), (1, 4), (4, 1), (3, 3), (2, 4), (2, 2), (5, 1), (1, 1))
#: Every grid of up to ten tiles: the pinpoints of granite-vision-3.2, which is built this way.
TEN_TILES = tuple((h, w) for h in range(1, 11) for w in range(1, 11) if h * w <= 10)


def config_of(
    tower: str = "clip",
    side: int = 336,
    shapes: tuple[tuple[int, int], ...] = DEFAULT,
    *,
    strategy: str | None = None,
    pinpoints: list[list[int]] | None = None,
    hidden: int = 4,
    patch: int = 14,
) -> Any:
    small = {"hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1}
    vision_class = CLIPVisionConfig if tower == "clip" else SiglipVisionConfig
    text = {**small, "hidden_size": hidden, "num_hidden_layers": 1, "vocab_size": 8}
    return LlavaNextConfig(
        vision_config=vision_class(**small, num_hidden_layers=2, image_size=side, patch_size=patch),
        text_config=LlamaConfig(**text),
        image_token_index=7,
        image_grid_pinpoints=grids(side, *shapes) if pinpoints is None else pinpoints,
        vision_feature_select_strategy=strategy or ("default" if tower == "clip" else "full"),
    )


GEOMETRIES = {
    "336/14": config_of(),
    "384/14": config_of("siglip", 384),
    "336/14-custom": config_of("clip", 336, CUSTOM),
    "384/14-custom": config_of("siglip", 384, CUSTOM),
    "384/14-ten-tiles": config_of("siglip", 384, TEN_TILES),
}


def boundaries(config: Any) -> Iterator[tuple[int, int]]:
    """Sizes at which a formula may break: pinpoints and their ratios, one more, one less; 1 x N."""
    near = (-1, 0, 1)
    for height, width in config.image_grid_pinpoints:
        for scale in (0.25, 0.5, 1, 1.5, 2, 3):
            for dy in near:
                for dx in near:
                    yield round(height * scale) + dy, round(width * scale) + dx
    for length in (*range(1, 400), *range(400, LONGEST, 37), *range(LONGEST - 3, LONGEST + 1)):
        for short in (1, 2, 3):
            yield from ((short, length), (length, short))
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    for height, width in config.image_grid_pinpoints:
        rows, columns = height // vision.image_size * side, width // vision.image_size * side
        yield from ((h, w) for w, h in rounded_down(columns, rows))
        yield from rounded_down(rows, columns)


def rounded_down(length: int, across: int) -> Iterator[tuple[int, int]]:
    """Sizes that scaled to `length` patches are a whole number across, but for a float's error.

    `round(…, 7)` in the formula is there for these; `int` alone loses a line of patches.
    """
    for whole in range(1, across):
        common = math.gcd(whole, length)
        for times in range(1, LONGEST * common // max(whole, length) + 1):
            one, other = length // common * times, whole // common * times
            if int(other * (length / one)) != whole:
                yield one, other


def sizes(config: Any, num: int, seed: int) -> list[tuple[int, int]]:
    """At least `num` different sizes (height, width): boundaries, then random ones of any shape."""
    rng = random.Random(seed)
    found = {size for size in boundaries(config) if min(size) >= 1 and max(size) <= LONGEST}
    while len(found) < num:
        uniform = (rng.randint(1, LONGEST), rng.randint(1, LONGEST))
        small = (round(LONGEST ** rng.random()), round(LONGEST ** rng.random()))
        found |= {uniform, small}
    return sorted(found)


def rows_of_the_model(config: Any, height: int, width: int) -> int:
    """Rows that `pack_image_features` makes: its functions, on a view without memory."""
    side = config.vision_config.image_size // config.vision_config.patch_size
    rows, columns = theirs.get_anyres_image_grid_shape(
        (height, width), config.image_grid_pinpoints, config.vision_config.image_size
    )
    grid = torch.empty(1, 1, 1).expand(1, rows * side, columns * side)
    kept = theirs.unpad_image(grid, (height, width)).shape
    return int(side**2 + kept[1] * (kept[2] + 1))


def processor_of(config: Any) -> Any:
    """As much of transformers' processor as its counting needs."""
    made = LlavaNextProcessor.__new__(LlavaNextProcessor)
    made.image_processor = SimpleNamespace(image_grid_pinpoints=config.image_grid_pinpoints)
    made.patch_size = config.vision_config.patch_size
    made.vision_feature_select_strategy = config.vision_feature_select_strategy
    made.num_additional_image_tokens = int(made.vision_feature_select_strategy == "default")
    return made


@pytest.mark.parametrize("name", GEOMETRIES)
def test_count_is_transformers_on_every_size(name: str) -> None:
    config = GEOMETRIES[name]
    side, processor = config.vision_config.image_size, processor_of(config)
    dropped = config.vision_feature_select_strategy == "default"
    most = layout(config, *largest_size(config)).num_tokens
    tried = sizes(config, 20_000, seed=len(name))  # 100,000 in all geometries
    for height, width in tried:
        count = layout(config, height, width).num_tokens
        by_processor = processor._get_number_of_features(height, width, side, side) - dropped
        assert count == rows_of_the_model(config, height, width) == by_processor, (height, width)
        assert count <= most, (height, width)


@pytest.mark.parametrize("name", GEOMETRIES)
def test_count_is_the_rows_that_transformers_packs(name: str) -> None:
    config = GEOMETRIES[name]
    side = config.vision_config.image_size // config.vision_config.patch_size
    tried = random.Random(0).sample(sizes(config, 6_000, seed=1), 150)
    tried += [(1, 1), (1, LONGEST), (LONGEST, 1), (LONGEST, LONGEST), largest_size(config)]
    for size in tried:
        place = layout(config, *size)
        features = torch.arange((1 + place.rows * place.columns) * side**2, dtype=torch.float32)
        (packed,), (length,) = theirs.LlavaNextModel.pack_image_features(
            SimpleNamespace(config=config),
            [features.view(-1, side**2, 1)],
            torch.tensor([size]),
            vision_feature_select_strategy=config.vision_feature_select_strategy,
            image_newline=torch.tensor([-1.0]),
        )
        assert place.num_tokens == len(packed) == length, size
        assert int((packed == -1).sum()) == place.height


def test_counts_of_the_published_checkpoints() -> None:
    vicuna = GEOMETRIES["336/14"]  # as llava-v1.6-vicuna-7b and llava-v1.6-mistral-7b
    assert vicuna.image_grid_pinpoints == LlavaNextConfig().image_grid_pinpoints
    assert layout(vicuna, *largest_size(vicuna)).num_tokens == 2928
    assert layout(vicuna, 480, 640).num_tokens == 2340
    ten = GEOMETRIES["384/14-ten-tiles"]
    assert largest_size(ten) == (3840, 384)  # of equal areas the one with the most lines
    assert layout(ten, 3840, 384).num_tokens == 27**2 + 270 * 28


@pytest.mark.parametrize("name", GEOMETRIES)
def test_most_tokens_are_reached_by_the_largest_size(name: str) -> None:
    config = GEOMETRIES[name]
    size = largest_size(config)
    assert list(size) in config.image_grid_pinpoints
    most = max(rows_of_the_model(config, *other) for other in sizes(config, 4_000, seed=2))
    assert layout(config, *size).num_tokens == rows_of_the_model(config, *size) == most


UNPACKABLE = {
    "class token kept": ({"tower": "clip", "strategy": "full"}, "17 rows for 4 x 4 .* to default"),
    "patch dropped": ({"tower": "siglip", "strategy": "default"}, "15 rows for 4 x 4 .* to full"),
    "more than a tile": ({"pinpoints": [[32, 64], [40, 40]]}, r"\[40, 40\]. .* of 32 pixels"),
    "less than a tile": ({"pinpoints": [[16, 64]]}, r"\[16, 64\]"),
    "no pinpoints": ({"pinpoints": []}, r"tiles: \[\]"),
}


@pytest.mark.filterwarnings("ignore:divide by zero|invalid value:RuntimeWarning")  # their own
@pytest.mark.parametrize("hidden", [4, 64])  # 64 is a multiple of 4 x 4: there a view succeeds
@pytest.mark.parametrize("case", UNPACKABLE)
def test_what_transformers_cannot_lay_out_is_refused(case: str, hidden: int) -> None:
    options, message = UNPACKABLE[case]
    config = config_of(**{"side": 32, "patch": 8, "hidden": hidden, **options})
    with pytest.raises((RuntimeError, TypeError, ZeroDivisionError)):
        rows_of_transformers(config)
    for refused in (check, largest_size):
        with pytest.raises(StartupError, match=message) as error:
            refused(config)
        assert "\n" not in str(error.value)


def test_pinpoint_without_pixels_is_refused() -> None:
    with pytest.raises(StartupError, match=r"tiles: \[0, 32\]"):
        check(config_of(side=32, patch=8, pinpoints=[[32, 32], [0, 32]]))


PAIRS = "must be pairs of whole numbers: got "
ABSURD: dict[str, tuple[Any, str]] = {
    "flat": ([96, 96], PAIRS + "96. Correct them"),
    "texts": ([["32", "32"]], PAIRS + "['32', '32']. Correct them"),
    "floats": ([[32.0, 32.0]], PAIRS + "[32.0, 32.0]. Correct them"),
    "truths": ([[True, 32]], PAIRS + "[True, 32]. Correct them"),
    "triple": ([[32, 32], [32, 32, 32]], PAIRS + "[32, 32, 32]. Correct them"),
    "nothing": (None, PAIRS + "None. Correct them"),
    "too many": ([[32, 32]] * 1_000_000, "too many: 1000000. Give at most 256"),
    "too large": ([[960_000, 960_000]], "960000 x 960000 pixels into 900000000 of 32 pixels"),
    "too long": ([[32, 32], [32 * 257, 32]], "8224 x 32 pixels into 257 of 32 pixels"),
}


@pytest.mark.parametrize("case", ABSURD)
def test_absurd_pinpoints_are_refused_at_once(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    """That is, before anything is laid out."""
    monkeypatch.delattr(counts, "layout")
    config = config_of(side=32, patch=8)
    config.image_grid_pinpoints, message = ABSURD[case]
    with pytest.raises(
        StartupError, match="^image_grid_pinpoints.* " + re.escape(message)
    ) as error:
        largest_size(config)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


def test_as_many_pinpoints_and_tiles_as_allowed_are_laid_out_once_each(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, int]] = []

    def noted(config: Any, height: int, width: int) -> Layout:
        asked.append((height, width))
        return layout(config, height, width)

    monkeypatch.setattr(counts, "layout", noted)
    shapes = tuple((rows, columns) for rows in range(1, 17) for columns in range(1, 17))
    config = config_of(side=32, patch=8, shapes=shapes)
    assert largest_size(config) == (512, 512)
    assert sorted(asked) == sorted((32 * rows, 32 * columns) for rows, columns in shapes)


@pytest.mark.parametrize(("image", "patch"), [(32, 0), (0, 8), (8, 32), (-32, 8), ("32", 8)])
def test_a_tower_without_patches_is_refused(image: Any, patch: int) -> None:
    vision = SimpleNamespace(model_type="clip_vision_model", image_size=image, patch_size=patch)
    config = SimpleNamespace(vision_config=vision, vision_feature_select_strategy="default")
    with pytest.raises(StartupError, match=f"leave no patch: {image!r} and {patch!r} pixels"):
        largest_size(config)


@pytest.mark.parametrize("tower", ["clip", "siglip"])
def test_what_transformers_lays_out_is_taken(tower: str) -> None:
    config = config_of(tower, 32, patch=8)
    assert layout(config, 40, 40).num_tokens == rows_of_transformers(config)
    check(config)


def rows_of_transformers(config: Any) -> int:
    """Rows that the whole model makes of an image of 40 by 40 pixels."""
    size = torch.tensor([[40, 40]])
    num_pictures = theirs.image_size_to_num_patches(size[0], config.image_grid_pinpoints, 32)
    with torch.inference_mode():
        model = theirs.LlavaNextModel(config).eval()
        features = model.get_image_features(torch.zeros(1, num_pictures, 3, 32, 32), size)
    return len(features.pooler_output[0])
