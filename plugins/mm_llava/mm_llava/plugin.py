"""LLaVA-1.5's hooks: every image is resized and cropped to one size, so it takes a fixed count."""

from __future__ import annotations

from mm_engine.plugins import ModelContext, hookimpl
from torch import nn

from mm_llava.counts import num_image_tokens


@hookimpl
def model_class(ctx: ModelContext) -> type[nn.Module]:
    """The model; imported here so that listing plugins stays cheap."""
    from mm_llava.model import LlavaForConditionalGeneration

    return LlavaForConditionalGeneration


@hookimpl
def max_tokens(ctx: ModelContext, modality: str) -> int:
    """Every image takes the same number, so the most is also the count.

    The mapper, the input processor and the dummy data are mm-engine's defaults for this case.
    """
    return num_image_tokens(ctx.hf_config)
