"""Content keys are equal just for what gives equal features."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from PIL import Image

from mm_engine.config import EngineConfig
from mm_engine.inputs.hashing import content_key
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.plugins import defaults
from mm_engine.plugins.plugin import Plugin
from mm_engine.request import PromptInputs
from mm_engine.worker.loader import open_model
from parity import picture

RED = (200, 10, 10)


def key(pipeline: InputPipeline, image: Image.Image) -> str:
    inputs = PromptInputs(prompt="<image>", multi_modal_data={"image": (image,)})
    return pipeline.prepare(inputs).items[0].content_key


def test_equal_pictures_have_equal_keys(pipeline: InputPipeline) -> None:
    assert key(pipeline, picture(1)) == key(pipeline, picture(1).copy())
    assert len(key(pipeline, picture(1))) == 64


def test_one_changed_value_changes_the_key(pipeline: InputPipeline) -> None:
    image = picture(1)
    red, green, blue = image.getpixel((39, 31))
    image.putpixel((39, 31), (red, green, blue ^ 1))
    assert key(pipeline, image) != key(pipeline, picture(1))


def test_same_bytes_in_another_shape_are_another_picture(pipeline: InputPipeline) -> None:
    image = picture(1, 40, 32)
    shapes = {(40, 32), (32, 40), (20, 64)}
    images = [Image.frombytes("RGB", size, image.tobytes()) for size in shapes]
    assert len({key(pipeline, image) for image in images}) == 3


def test_mappers_options_change_the_key(copy: Path) -> None:
    def key_now() -> str:
        defaults.image_processor.cache_clear()  # a process reads them once
        defaults.mapper_options.cache_clear()
        return key(InputPipeline(open_model(EngineConfig(model=str(copy)))), picture(1))

    before = key_now()
    assert key_now() == before
    file = copy / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "image_mean": [0.5, 0.5, 0.5]}))
    assert key_now() != before


def test_plugins_version_changes_the_key(pipeline: InputPipeline) -> None:
    plugin = pipeline.plugin
    newer = Plugin.__new__(Plugin)
    newer.__dict__.update(plugin.__dict__)
    newer.record = dataclasses.replace(plugin.record, version="99.0")
    newer.label = newer.record.label
    opened = dataclasses.replace(pipeline.opened, plugin=newer)
    assert key(InputPipeline(opened), picture(1)) != key(pipeline, picture(1))


def test_options_dont_run_together() -> None:
    image = picture(1)
    assert content_key("image", image, "ab", "c") != content_key("image", image, "a", "bc")
    assert content_key("image", image, "a", "") != content_key("image", image, "a")
    assert content_key("image", image) != content_key("video", image)


def solid(mode: str, colour: object) -> Image.Image:
    return Image.new(mode, (8, 8), colour)


@pytest.mark.parametrize(
    ("image", "rgb"),
    [
        (solid("RGBA", (*RED, 255)), RED),
        (solid("RGBA", (*RED, 0)), (255, 255, 255)),
        (solid("L", 77), (77, 77, 77)),
        (solid("LA", (77, 0)), (255, 255, 255)),
        (solid("P", 0), (0, 0, 0)),
        (solid("RGB", RED).quantize(4), RED),
        (solid("1", 1), (255, 255, 255)),
        (solid("I;16", 0x4D80), (77, 77, 77)),
        (solid("I", 0x4D80), (77, 77, 77)),
        (solid("I", 2**20), (255, 255, 255)),
        (solid("CMYK", (0, 255, 255, 0)), (255, 0, 0)),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else "",
)
def test_pictures_of_any_mode_become_the_one_rgb(
    pipeline: InputPipeline, image: Image.Image, rgb: tuple[int, int, int]
) -> None:
    assert key(pipeline, image) == key(pipeline, solid("RGB", rgb))
    assert key(pipeline, image) != key(pipeline, solid("RGB", (1, 2, 3)))
