"""The hooks, called as the engine calls them."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_llava_next
from mm_engine import LLM, SamplingParams
from mm_engine.config import EngineConfig
from mm_engine.errors import PluginError, RequestError, StartupError
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.plugins.discovery import find
from mm_engine.request import PlaceholderRange, PromptInputs
from mm_engine.worker.loader import OpenedModel, open_model
from parity import Oracle, picture
from PIL import Image
from transformers import LlavaNextImageProcessorPil

from mm_llava_next.counts import layout
from mm_llava_next.model import LlavaNextForConditionalGeneration

SIDE = 32  # pixels of a tile, in patches of 8
MOST = 4 * 4 + 8 * (8 + 1)  # tokens of 2 x 2 full tiles
IMAGE = 4  # the image token's id
SIZES = [(32, 64), (1, 1), (1, 4000), (4000, 1), (4000, 4000), (7, 80), (64, 64), (65, 63)]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_next(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def opened(path: Path) -> OpenedModel:
    return open_model(EngineConfig(model=str(path), dtype="float32"))


def mapped(opened: OpenedModel, width: int, height: int) -> dict[str, torch.Tensor]:
    return opened.plugin.map_item(opened.ctx, "image", Image.new("RGB", (width, height), "teal"))


def test_plugin_is_found_by_its_architecture() -> None:
    record = find("LlavaNextForConditionalGeneration")
    assert (record.distribution, record.module) == ("mm-llava-next", "mm_llava_next.plugin")


def test_hooks_that_it_implements(opened: OpenedModel) -> None:
    hooks = {"model_class", "max_tokens", "input_processor", "dummy_data"}
    assert set(opened.plugin.hooks) == hooks
    assert opened.plugin.model_class(opened.ctx) is LlavaNextForConditionalGeneration
    assert opened.plugin.max_tokens(opened.ctx, "image") == MOST
    assert opened.plugin.placeholder_text(opened.ctx, "image", 0) == "<image>"


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
def test_mapper_gives_the_keywords_of_embed_images(
    opened: OpenedModel, size: tuple[int, int]
) -> None:
    tensors = mapped(opened, *size)
    parameters = inspect.signature(LlavaNextForConditionalGeneration.embed_images).parameters
    assert set(tensors) == set(parameters) - {"self"}
    place = layout(opened.ctx.hf_config, size[1], size[0])
    assert tensors["pixel_values"].shape == (1 + place.rows * place.columns, 3, SIDE, SIDE)
    assert tensors["image_sizes"].tolist() == [size[1], size[0]]


def test_processor_gives_every_image_its_own_count(opened: OpenedModel) -> None:
    sizes = [(64, 64), (1, 90), (100, 20)]
    items = tuple(mapped(opened, *size) for size in sizes)
    before = [{name: tensor.clone() for name, tensor in item.items()} for item in items]
    inputs = PromptInputs(
        prompt_token_ids=(1, IMAGE, 9, IMAGE, IMAGE, 8),
        multi_modal_data={"image": tuple(Image.new("RGB", size) for size in sizes)},
        mapped={"image": items},
    )
    result = opened.plugin.process(opened.ctx, inputs)
    # The whole image's 4 x 4 patches, and of the tiles': all 8 x 8; of 12 x 4 twelve empty lines;
    # of 4 x 12 the two lines in the middle. A newline ends each line.
    counts = [16 + 8 * 9, 16 + 12 * 1, 16 + 2 * 13]
    assert result.prompt_token_ids == (
        1, *[IMAGE] * counts[0], 9, *[IMAGE] * counts[1], *[IMAGE] * counts[2], 8,
    )  # fmt: skip
    offsets = (1, 2 + counts[0], 2 + counts[0] + counts[1])
    assert result.placeholders == tuple(
        PlaceholderRange("image", i, offsets[i], counts[i]) for i in range(3)
    )
    assert inputs.prompt_token_ids == (1, IMAGE, 9, IMAGE, IMAGE, 8)
    for item, copy in zip(items, before, strict=True):
        assert all(torch.equal(item[name], copy[name]) for name in copy)


def test_text_and_expanded_ids_are_the_same_prompt(opened: OpenedModel) -> None:
    pipeline = InputPipeline(opened)
    data = {"image": (Image.new("RGB", (70, 30)), Image.new("RGB", (30, 90)))}
    prompt = "Which is larger, <image> or <image>?"
    by_text = pipeline.prepare(PromptInputs(prompt=prompt, multi_modal_data=data))
    by_ids = pipeline.prepare(
        PromptInputs(prompt_token_ids=by_text.prompt_token_ids, multi_modal_data=data)
    )
    assert by_ids.prompt_token_ids == by_text.prompt_token_ids
    assert [item.placeholder for item in by_ids.items] == [i.placeholder for i in by_text.items]


def test_prompt_with_too_few_placeholders_is_the_requests_fault(opened: OpenedModel) -> None:
    inputs = PromptInputs(prompt_token_ids=(1, 9), mapped={"image": (mapped(opened, 20, 30),)})
    with pytest.raises(RequestError, match="0 placeholders for 1 image. Put one <image> in"):
        opened.plugin.process(opened.ctx, inputs)


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_mode_of_a_picture_does_not_change_its_count(opened: OpenedModel, mode: str) -> None:
    pipeline = InputPipeline(opened)
    image = Image.new("L", (90, 50), 77).convert("I" if mode == "I;16" else mode)
    image = image.convert("I;16") if mode == "I;16" else image
    prepared = pipeline.prepare(
        PromptInputs(prompt="<image>", multi_modal_data={"image": (image,)})
    )
    (item,) = prepared.items
    assert item.placeholder.length == layout(opened.ctx.hf_config, 50, 90).num_tokens
    assert item.tensors["image_sizes"].tolist() == [50, 90]


def test_processor_that_cuts_otherwise_than_the_config_is_told_apart(tmp_path: Path) -> None:
    path = make_llava_next(tmp_path)
    size = {"height": SIDE, "width": SIDE}
    LlavaNextImageProcessorPil(
        size={"shortest_edge": SIDE}, crop_size=size, image_grid_pinpoints=[[SIDE, SIDE]]
    ).save_pretrained(path)
    opened = open_model(EngineConfig(model=str(path)))
    inputs = PromptInputs(prompt_token_ids=(IMAGE,), mapped={"image": (mapped(opened, 20, 30),)})
    cut = "cut 20x30 pixels into 1 tiles, config.json's image_grid_pinpoints into 1 x 2"
    with pytest.raises(
        PluginError, match=f"mm-llava-next .* input_processor .*raised ValueError: .*{cut}"
    ):
        opened.plugin.process(opened.ctx, inputs)


@pytest.mark.parametrize("num_images", [1, 2])
def test_dummy_data_reaches_the_most_tokens(opened: OpenedModel, num_images: int) -> None:
    assert dummy_lengths(opened, 500, num_images) == ([MOST] * num_images, 500)


def test_dummy_data_is_a_tall_image_where_lines_cost_the_most(tmp_path: Path) -> None:
    pinpoints = [[SIDE, 3 * SIDE], [3 * SIDE, SIDE]]
    opened = open_model(EngineConfig(model=str(make_llava_next(tmp_path, pinpoints=pinpoints))))
    most = 4 * 4 + 12 * (4 + 1)
    assert opened.plugin.max_tokens(opened.ctx, "image") == most
    assert dummy_lengths(opened, 20, 1) == ([most], most + 1)  # some text follows


def test_dummy_data_without_images_is_text(opened: OpenedModel) -> None:
    assert dummy_lengths(opened, 90, 0) == ([], 90)


def dummy_lengths(opened: OpenedModel, seq_len: int, num_images: int) -> tuple[list[int], int]:
    """Tokens of the dummy's images, and of all of it."""
    dummy = opened.plugin.dummy_data(opened.ctx, seq_len, {"image": num_images})
    prepared = InputPipeline(opened).prepare(dummy)
    return [item.placeholder.length for item in prepared.items], len(prepared.prompt_token_ids)


@pytest.mark.parametrize(("tower", "strategy"), [("clip", "full"), ("siglip", "default")])
@pytest.mark.parametrize("num_images", [0, 8])
def test_what_cannot_be_laid_out_is_refused_at_startup(
    tower: str, strategy: str, num_images: int, tmp_path: Path
) -> None:
    path = make_llava_next(tmp_path, tower=tower, strategy=strategy)
    with pytest.raises(StartupError, match="features of a tile can't be laid out: ") as error:
        LLM(str(path), progress=False, limit_mm_per_prompt={"image": num_images})
    assert "\n" not in str(error.value)


def test_features_are_those_of_transformers_alone_and_among_others(path: Path) -> None:
    llm = LLM(str(path), dtype="float32", progress=False)
    runner: Any = llm.engine.runner
    model = runner._runner.model
    plugin, ctx = llm.pipeline.plugin, llm.pipeline.ctx
    sizes = [(64, 64), (64, 60), (10, 90), (90, 10), (4000, 3), (3, 4000)]
    images = [picture(i, *size) for i, size in enumerate(sizes)]
    items = [plugin.map_item(ctx, "image", image) for image in images]
    expected = Oracle(path).features(images)
    with torch.inference_mode():
        together = model.embed_images(
            pixel_values=[item["pixel_values"] for item in items],
            image_sizes=torch.stack([item["image_sizes"] for item in items]),
        )
        alone = [
            model.embed_images(**{name: tensor[None] for name, tensor in item.items()})[0]
            for item in items
        ]
    for one, among, theirs in zip(alone, together, expected, strict=True):
        torch.testing.assert_close(one, theirs)
        torch.testing.assert_close(among, theirs)


def test_it_answers_in_bfloat16(path: Path) -> None:
    llm = LLM(str(path), dtype="bfloat16", progress=False)
    images = [Image.new("RGB", (90, 40), "red"), Image.new("L", (3, 4000))]
    prompt = {"prompt": "<image> and <image>:", "multi_modal_data": {"image": images}}
    (output,) = llm.generate([prompt], SamplingParams(max_tokens=6, ignore_eos=True))
    assert output.error is None
    assert len(output.outputs[0].token_ids) == 6
