"""The hooks of InternVLForConditionalGeneration."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image
from torch import Tensor, nn

from mm_engine.plugins import (
    ModelContext,
    PromptInputs,
    StartupError,
    dummy_prompt,
    expand_placeholders,
    hookimpl,
    image_processor,
    image_token,
    placeholder_token_id,
)
from mm_internvl.counts import grid_of_patches, max_pictures, num_image_tokens


@hookimpl
def model_class(ctx: ModelContext) -> type[nn.Module]:
    """The model; imported here so that listing plugins stays cheap."""
    from mm_internvl.model import InternVLForConditionalGeneration

    return InternVLForConditionalGeneration


@hookimpl
def register_input_mapper(ctx: ModelContext, register: Callable[..., None]) -> None:
    """Images are cut into tiles by the checkpoint's image processor."""
    register("image", map_image)


def map_image(ctx: ModelContext, image: Image.Image) -> dict[str, Tensor]:
    """One image to its pictures `[num_pictures, 3, side, side]`: the tiles, and all of it small.

    The image processor's default is no tiles; transformers' `InternVLProcessor` asks for them.
    """
    features = image_processor(ctx)(images=image, crop_to_patches=True, return_tensors="pt")
    return {"pixel_values": features["pixel_values"]}


@hookimpl
def max_tokens(ctx: ModelContext, modality: str) -> int:
    """An image of the most tiles takes the most."""
    processor = image_processor(ctx)
    pictures = max_pictures(processor.min_patches, processor.max_patches)
    return num_image_tokens(ctx.hf_config, pictures, picture_side(ctx))


def picture_side(ctx: ModelContext) -> int:
    """Pixels along one side of a picture.

    Raises:
        StartupError: transformers' `get_image_features` couldn't shuffle its patches.
    """
    config: Any = ctx.hf_config
    height, width = (int(image_processor(ctx).size[name]) for name in ("height", "width"))
    rows, columns = grid_of_patches(config, height)
    fits = height == width and rows == columns and rows * config.downsample_ratio % 1 == 0
    if not fits or config.vision_feature_select_strategy != "default":
        raise StartupError(
            f"the patches of a picture of {width}x{height} pixels don't make whole squares, or the "
            "class token is among them. Correct config.json or preprocessor_config.json."
        )
    return height


@hookimpl
def input_processor(ctx: ModelContext, inputs: PromptInputs) -> PromptInputs:
    """Each image's placeholder becomes as many as its pictures take; the markers stay."""
    shapes = [item["pixel_values"].shape for item in inputs.mapped["image"]]
    counts = [num_image_tokens(ctx.hf_config, shape[0], shape[-1]) for shape in shapes]
    return expand_placeholders(
        inputs, placeholder_token_id(ctx), counts, text=placeholder_text(ctx, "image", 0)
    )


@hookimpl
def placeholder_text(ctx: ModelContext, modality: str, index: int) -> str:
    """The image token between InternVL's two markers."""
    tokenizer: Any = ctx.tokenizer
    return f"{tokenizer.start_image_token}{image_token(ctx)}{tokenizer.end_image_token}"


@hookimpl
def dummy_data(ctx: ModelContext, seq_len: int, counts: Mapping[str, int]) -> PromptInputs:
    """Images that are just as wide as the most tiles side by side, then text."""
    side, most = picture_side(ctx), functools.partial(max_tokens, ctx)
    size = (image_processor(ctx).max_patches * side, side)
    return dummy_prompt(ctx, seq_len, counts, most, size=size)
