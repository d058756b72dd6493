"""Prompts and items of the wrong kind, and plugins whose dummy data is."""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from checkpoints import VOCAB_SIZE, make_tokenizer
from mm_engine.config import EngineConfig
from mm_engine.errors import PluginError, RequestError
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.request import PromptInputs
from mm_engine.worker.loader import open_model
from parity import picture

PLUGIN = """
from mm_engine.plugins import PromptInputs, expand_placeholders, hookimpl
from PIL import Image
from torch import nn
ARCHITECTURES = ["LlavaForConditionalGeneration"]
SEEN = []

@hookimpl
def model_class(ctx): return nn.Module

@hookimpl
def max_tokens(ctx, modality): return 16

@hookimpl
def dummy_data(ctx, seq_len, counts):
    image = ctx.hf_config.image_token_index
    data = {"image": (Image.new("RGB", (32, 32)),)}
    return PromptInputs(prompt_token_ids=(image, *(50,) * (LENGTH - 16)), multi_modal_data=data)

@hookimpl
def input_processor(ctx, inputs):
    for image in inputs.multi_modal_data["image"]:
        assert image.mode == "RGB", image.mode
    return expand_placeholders(inputs, ctx.hf_config.image_token_index, [16])
"""


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path) -> Callable[..., InputPipeline]:
    """`own(length, **options)`: with a plugin whose dummy prompt is `length` tokens long."""

    def own(length: int, **options: Any) -> InputPipeline:
        file = tmp_path / "own_plugin.py"
        file.write_text(PLUGIN.replace("LENGTH", str(length)))
        config = EngineConfig(model=str(checkpoint), plugins=(str(file),), device="cpu", **options)
        return InputPipeline(open_model(config))

    return own


@pytest.mark.parametrize(("length", "fits"), [(31, False), (32, True), (512, True), (513, False)])
def test_dummy_data_must_be_as_long_as_asked_and_fit_the_model(
    own: Callable[..., InputPipeline], length: int, fits: bool
) -> None:
    pipeline = own(length)
    if fits:
        assert len(pipeline.dummy_request().prompt_token_ids) == length
        return
    with pytest.raises(PluginError, match=f"dummy_data .*expected 32 to 512 tokens, got {length}"):
        pipeline.dummy_request()


def test_a_short_model_without_images_still_has_dummy_data(checkpoint: Path) -> None:
    config = EngineConfig(model=str(checkpoint), max_model_len=17, limit_mm_per_prompt={"image": 0})
    assert len(InputPipeline(open_model(config)).dummy_request().prompt_token_ids) == 16
    with pytest.raises(RequestError, match="too many images: 1. At most 0"):
        InputPipeline(open_model(config)).prepare(
            PromptInputs(prompt="<image>", multi_modal_data={"image": (picture(1),)})
        )


def test_processors_see_the_pictures_as_rgb(own: Callable[..., InputPipeline]) -> None:
    image = Image.new("RGBA", (40, 30), (10, 20, 30, 40))
    prepared = own(32).prepare(PromptInputs(prompt="<image>", multi_modal_data={"image": (image,)}))
    assert len(prepared.items) == 1


def test_a_picture_whose_file_ends_early_is_the_requests_fault(pipeline: InputPipeline) -> None:
    buffer = BytesIO()
    picture(1, 200, 200).save(buffer, "PNG")
    image = Image.open(BytesIO(buffer.getvalue()[:5000]))  # its header is whole
    with pytest.raises(RequestError, match="image can't be decoded: OSError. Give a whole picture"):
        pipeline.prepare(PromptInputs(prompt="<image>", multi_modal_data={"image": (image,)}))


def test_a_token_that_the_model_lacks_is_refused_in_text_too(
    open_with: Callable[..., InputPipeline],
) -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<beyond>"])
    assert tokenizer.convert_tokens_to_ids("<beyond>") >= VOCAB_SIZE
    pipeline = open_with(tokenizer)
    with pytest.raises(RequestError, match=f"out of range: {VOCAB_SIZE}"):
        pipeline.prepare(PromptInputs(prompt="a <beyond> b"))
    with pytest.raises(RequestError, match=f"out of range: {VOCAB_SIZE}"):
        pipeline.prepare_chat([{"role": "user", "content": "a <beyond> b"}])


@pytest.mark.parametrize("prompt", [3, b"bytes", ["a", "b"]])
def test_a_prompt_that_is_no_text_is_refused(pipeline: InputPipeline, prompt: Any) -> None:
    with pytest.raises(RequestError, match="the prompt is not a text"):
        pipeline.prepare(PromptInputs(prompt=prompt))
