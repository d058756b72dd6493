"""LLaVA-NeXT's hooks: an image is cut into tiles by its shape, so its size decides its count."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from mm_engine.plugins import (
    ModelContext,
    PromptInputs,
    dummy_prompt,
    expand_placeholders,
    hookimpl,
    image_token,
    placeholder_token_id,
)
from torch import nn

from mm_llava_next.counts import largest_size, layout


@hookimpl
def model_class(ctx: ModelContext) -> type[nn.Module]:
    """The model; imported here so that listing plugins stays cheap."""
    from mm_llava_next.model import LlavaNextForConditionalGeneration

    return LlavaNextForConditionalGeneration


@hookimpl
def max_tokens(ctx: ModelContext, modality: str) -> int:
    """The most that any size takes: found by going through the pinpoints."""
    return layout(ctx.hf_config, *largest_size(ctx.hf_config)).num_tokens


@hookimpl
def input_processor(ctx: ModelContext, inputs: PromptInputs) -> PromptInputs:
    """Each image's placeholder becomes as many as its size asks for.

    The mapper is mm-engine's default: the checkpoint's image processor gives `pixel_values`
    `[1 + tiles, 3, side, side]` and `image_sizes` `[2]`, the image's height and width.
    """
    counts = []
    for item in inputs.mapped["image"]:
        height, width = item["image_sizes"].tolist()
        place, num_tiles = layout(ctx.hf_config, height, width), len(item["pixel_values"]) - 1
        if num_tiles != place.rows * place.columns:
            raise ValueError(
                f"the image processor cut {width}x{height} pixels into {num_tiles} tiles, "
                f"config.json's image_grid_pinpoints into {place.rows} x {place.columns}"
            )
        counts.append(place.num_tokens)
    return expand_placeholders(inputs, placeholder_token_id(ctx), counts, text=image_token(ctx))


@hookimpl
def dummy_data(ctx: ModelContext, seq_len: int, counts: Mapping[str, int]) -> PromptInputs:
    """Images of the costliest size, then text."""
    height, width = largest_size(ctx.hf_config)
    return dummy_prompt(ctx, seq_len, counts, partial(max_tokens, ctx), size=(width, height))
