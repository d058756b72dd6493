"""The hooks, called as the engine calls them."""

from __future__ import annotations

import inspect

import pytest
from mm_engine.config import EngineConfig
from mm_engine.errors import RequestError
from mm_engine.plugins.discovery import find
from mm_engine.request import PlaceholderRange, PromptInputs
from mm_engine.worker.loader import OpenedModel, open_model
from PIL import Image

from mm_llava.model import LlavaForConditionalGeneration

NUM_TOKENS = 144  # of one image of the demo


@pytest.fixture(scope="module")
def opened() -> OpenedModel:
    return open_model(EngineConfig(model="llava-demo"))


def test_plugin_is_found_by_its_architecture() -> None:
    record = find("LlavaForConditionalGeneration")
    assert (record.distribution, record.module) == ("mm-llava", "mm_llava.plugin")


def test_two_hooks_are_enough(opened: OpenedModel) -> None:
    assert opened.plugin.hooks == ("model_class", "max_tokens")
    assert opened.plugin.model_class(opened.ctx) is LlavaForConditionalGeneration
    assert opened.plugin.max_tokens(opened.ctx, "image") == NUM_TOKENS
    assert opened.plugin.placeholder_text(opened.ctx, "image", 0) == "<image>"


@pytest.mark.parametrize("size", [(96, 96), (10, 300), (1000, 700), (1, 1)])
def test_mapper_gives_the_keywords_of_embed_images(
    opened: OpenedModel, size: tuple[int, int]
) -> None:
    tensors = opened.plugin.map_item(opened.ctx, "image", Image.new("RGB", size))
    parameters = inspect.signature(LlavaForConditionalGeneration.embed_images).parameters
    assert set(tensors) == set(parameters) - {"self"}
    assert tensors["pixel_values"].shape == (3, 96, 96)


def test_processor_gives_every_image_the_same_count(opened: OpenedModel) -> None:
    image = Image.new("RGB", (20, 30))
    mapped = opened.plugin.map_item(opened.ctx, "image", image)
    token = opened.ctx.tokenizer.convert_tokens_to_ids("<image>")
    inputs = PromptInputs(
        prompt_token_ids=(1, token, 9, token),
        multi_modal_data={"image": (image, image)},
        mapped={"image": (mapped, mapped)},
    )
    result = opened.plugin.process(opened.ctx, inputs)
    assert result.prompt_token_ids == (1, *[token] * NUM_TOKENS, 9, *[token] * NUM_TOKENS)
    assert result.placeholders == (
        PlaceholderRange("image", 0, 1, NUM_TOKENS),
        PlaceholderRange("image", 1, NUM_TOKENS + 2, NUM_TOKENS),
    )


def test_prompt_with_too_few_placeholders_is_the_requests_fault(opened: OpenedModel) -> None:
    image = Image.new("RGB", (20, 30))
    mapped = opened.plugin.map_item(opened.ctx, "image", image)
    inputs = PromptInputs(
        prompt_token_ids=(1, 9), multi_modal_data={"image": (image,)}, mapped={"image": (mapped,)}
    )
    with pytest.raises(RequestError, match="0 placeholders for 1 image"):
        opened.plugin.process(opened.ctx, inputs)


def test_dummy_data_is_as_long_as_asked(opened: OpenedModel) -> None:
    dummy = opened.plugin.dummy_data(opened.ctx, 500, {"image": 2})
    assert dummy.prompt_token_ids is not None
    assert [image.size for image in dummy.multi_modal_data["image"]] == [(96, 96)] * 2
    assert len(dummy.prompt_token_ids) == 500 - 2 * (NUM_TOKENS - 1)
