"""What the engine does for a plugin that leaves the hook out."""

from __future__ import annotations

import dataclasses
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    CLIPImageProcessorPil,
    LlavaNextImageProcessorPil,
    SiglipImageProcessorPil,
)
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from mm_engine.config import ModelContext
from mm_engine.errors import RequestError, StartupError
from mm_engine.plugins import PromptInputs, defaults, dummy_prompt
from mm_engine.plugins.plugin import Plugin

MakePlugin = Callable[..., Plugin]
IMAGE = 3


def picture(width: int, height: int) -> Image.Image:
    generator = torch.Generator().manual_seed(width * 1000 + height)
    pixels = torch.randint(0, 256, (height, width, 3), generator=generator, dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


@pytest.mark.parametrize("size", [(16, 16), (40, 30), (1, 1), (1, 3), (3, 1), (3, 50), (7, 90)])
def test_default_mapper_gives_what_the_checkpoints_processor_gives(
    make_plugin: MakePlugin, ctx: ModelContext, size: tuple[int, int]
) -> None:
    image = picture(*size)
    expected = AutoImageProcessor.from_pretrained(ctx.checkpoint)(images=image, return_tensors="pt")
    got = make_plugin().map_item(ctx, "image", image)
    assert list(got) == ["pixel_values"]
    assert got["pixel_values"].shape == (3, 16, 16)
    assert got["pixel_values"].dtype == torch.float32
    assert torch.equal(got["pixel_values"], expected["pixel_values"][0])


def test_mapper_key_changes_with_class_and_options(
    make_plugin: MakePlugin, ctx: ModelContext, tmp_path: Path
) -> None:
    size = {"height": 16, "width": 16}
    made = {
        "same": CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size),
        "other mean": CLIPImageProcessorPil(
            size={"shortest_edge": 16}, crop_size=size, image_mean=[0.5, 0.5, 0.5]
        ),
        "other class": SiglipImageProcessorPil(size=size),
    }
    plugin = make_plugin()
    keys = {"first": plugin.mapper_key(ctx, "image")}
    for name, processor in made.items():
        processor.save_pretrained(tmp_path / name)
        keys[name] = plugin.mapper_key(
            dataclasses.replace(ctx, checkpoint=tmp_path / name), "image"
        )
    assert keys["same"] == keys["first"]
    assert len(set(keys.values())) == 3


@pytest.mark.parametrize("kind", ["scaled by its short side", "padded to a square"])
@pytest.mark.parametrize("flip", [False, True])
def test_image_that_would_become_enormous_is_refused_before_it_does(
    make_plugin: MakePlugin, ctx: ModelContext, tmp_path: Path, kind: str, flip: bool
) -> None:
    pad = kind.startswith("padded")
    size = {"height": 336, "width": 336} if pad else {"shortest_edge": 336}
    LlavaImageProcessorPil(size=size, do_pad=pad).save_pretrained(tmp_path)
    ctx = dataclasses.replace(ctx, checkpoint=tmp_path)
    plugin = make_plugin()
    plugin.map_item(ctx, "image", picture(300, 4))
    image = Image.new("RGB", (2, 100_000) if flip else (100_000, 2))
    tracemalloc.start()
    start = time.monotonic()
    with pytest.raises(RequestError, match="too elongated .*: [0-9]+x[0-9]+ pixels"):
        plugin.map_item(ctx, "image", image)
    assert time.monotonic() - start < 30  # enormous ones take minutes, and all the memory
    assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    tracemalloc.stop()


@pytest.mark.parametrize("flip", [False, True])
def test_strip_that_is_fitted_into_a_grid_is_no_matter(
    make_plugin: MakePlugin, ctx: ModelContext, tmp_path: Path, flip: bool
) -> None:
    size = {"height": 16, "width": 16}
    LlavaNextImageProcessorPil(
        size={"shortest_edge": 16}, crop_size=size, image_grid_pinpoints=[[16, 32], [48, 16]]
    ).save_pretrained(tmp_path)
    ctx = dataclasses.replace(ctx, checkpoint=tmp_path)
    plugin = make_plugin()
    plugin.map_item(ctx, "image", picture(30, 20))
    image = Image.new("RGB", (2, 60_000) if flip else (60_000, 2))
    tracemalloc.start()
    tensors = plugin.map_item(ctx, "image", image)
    assert tracemalloc.get_traced_memory()[1] < 50 * 2**20
    tracemalloc.stop()
    assert tensors["pixel_values"].shape == (3, 3, 16, 16)  # whole, and the smaller grid
    assert tensors["image_sizes"].tolist() == [image.height, image.width]
    with pytest.raises(RequestError, match="too elongated .*: [0-9]+x[0-9]+ pixels"):
        plugin.map_item(ctx, "image", Image.new("RGB", (1, 65_536) if flip else (65_536, 1)))


def test_large_image_that_only_shrinks_is_no_matter(
    make_plugin: MakePlugin, ctx: ModelContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(defaults, "MAX_RESIZED_PIXELS", 1000)
    assert make_plugin().map_item(ctx, "image", picture(90, 80))["pixel_values"].shape[1:] == (
        16,
        16,
    )
    with pytest.raises(RequestError, match="too elongated"):
        make_plugin().map_item(ctx, "image", picture(90, 1))


def test_value_error_of_the_processor_is_about_the_image(
    make_plugin: MakePlugin, ctx: ModelContext, tmp_path: Path
) -> None:
    processor = CLIPImageProcessorPil(do_resize=True, size={"shortest_edge": 16}, do_normalize=True)
    processor.image_mean = [0.5, 0.5]  # two for three channels: a ValueError in transformers
    processor.save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="can't be processed: 20x20 pixels .ValueError: "):
        make_plugin().map_item(
            dataclasses.replace(ctx, checkpoint=tmp_path), "image", picture(20, 20)
        )


def test_checkpoint_without_an_image_processor_is_one_clear_sentence(
    make_plugin: MakePlugin, ctx: ModelContext, tmp_path: Path
) -> None:
    with pytest.raises(StartupError, match="no usable image processor") as error:
        make_plugin().map_item(
            dataclasses.replace(ctx, checkpoint=tmp_path), "image", picture(20, 20)
        )
    assert "\n" not in str(error.value)


def test_wrong_number_of_placeholders_names_the_text_to_write(
    make_plugin: MakePlugin, ctx: ModelContext
) -> None:
    mapped = {"image": ({"pixel_values": torch.zeros(1)},) * 2}
    with pytest.raises(RequestError) as error:
        make_plugin().process(ctx, PromptInputs(prompt_token_ids=(1, IMAGE), mapped=mapped))
    assert str(error.value) == (
        "the prompt has 1 placeholder for 2 images. Put one <image> in the text for each image."
    )


def test_default_processor_knows_images_only(make_plugin: MakePlugin, ctx: ModelContext) -> None:
    inputs = PromptInputs(prompt_token_ids=(1,), mapped={"video": ({"frames": torch.ones(1)},)})
    with pytest.raises(StartupError, match="images only: .'video'.. Implement it"):
        make_plugin().process(ctx, inputs)


@pytest.mark.parametrize("num_images", [0, 1, 3, 15, 16, 100])
@pytest.mark.parametrize("seq_len", [1, 30, 64, 1000])
def test_dummy_prompt_fills_the_length_when_processed_like_any_other(
    make_plugin: MakePlugin, ctx: ModelContext, num_images: int, seq_len: int
) -> None:
    plugin = make_plugin()
    raw = plugin.dummy_data(ctx, seq_len, {"image": num_images})
    images = raw.multi_modal_data.get("image", ())
    mapped = {"image": tuple(plugin.map_item(ctx, "image", image) for image in images)}
    got = plugin.process(ctx, dataclasses.replace(raw, mapped=mapped))
    assert len(images) == min(num_images, 15)  # 15 of 4 tokens fit in 64 with some text
    assert min(seq_len, 64) <= len(got.prompt_token_ids or ()) <= 64
    assert all(image.size == (16, 16) for image in images)


def test_dummy_images_have_the_size_that_a_plugin_names(ctx: ModelContext) -> None:
    def most(modality: str) -> int:
        return 10

    raw = dummy_prompt(ctx, 50, {"image": 2}, most, size=(70, 3))
    assert [image.size for image in raw.multi_modal_data["image"]] == [(70, 3)] * 2
    assert raw.prompt_token_ids == (IMAGE, IMAGE, *[1] * 30)
    assert dummy_prompt(ctx, 5, {}, most, size=(70, 3)).prompt_token_ids == (1,) * 5


def test_image_that_never_fits_is_refused_at_startup(
    make_plugin: MakePlugin, ctx: ModelContext
) -> None:
    ctx = dataclasses.replace(ctx, max_model_len=4)
    with pytest.raises(StartupError, match="takes 4 tokens of 4. Raise --max-model-len"):
        make_plugin().dummy_data(ctx, 4, {"image": 1})


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({"size": {"height": 20, "width": 30}, "do_center_crop": False}, (30, 20)),
        ({"size": {"shortest_edge": 24}, "crop_size": None, "do_center_crop": False}, (24, 24)),
        ({"size": {"shortest_edge": 24, "longest_edge": 48}, "crop_size": None}, (48, 48)),
    ],
)
def test_dummy_image_is_as_large_as_the_processor_takes_it(
    make_plugin: MakePlugin,
    ctx: ModelContext,
    tmp_path: Path,
    options: dict[str, object],
    size: tuple[int, int],
) -> None:
    class_ = SiglipImageProcessorPil if "crop_size" not in options else CLIPImageProcessorPil
    class_(**options).save_pretrained(tmp_path)
    ctx = dataclasses.replace(ctx, checkpoint=tmp_path)
    raw = make_plugin().dummy_data(ctx, 1, {"image": 1})
    assert raw.multi_modal_data["image"][0].size == size
