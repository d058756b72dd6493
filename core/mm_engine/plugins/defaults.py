"""What the engine does where a plugin leaves a hook out: images of one size, the usual way."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from mm_engine.config import ModelContext
from mm_engine.errors import RequestError, StartupError
from mm_engine.plugins.blame import one_line
from mm_engine.plugins.dummy import dummy_prompt
from mm_engine.plugins.placeholders import expand_placeholders, image_token, placeholder_token_id
from mm_engine.request import PromptInputs

MAX_SIDE = 65_535  # pixels; one that is longer costs a resize gigabytes, whatever comes of it
MAX_RESIZED_PIXELS = 32 * 2**20  # what resizing or padding may blow a small image up to
FALLBACK_SIZE = 336  # pixels; of the dummy image, for image processors that name no size


@functools.lru_cache(maxsize=8)
def image_processor(checkpoint: Path) -> Any:
    """Return the checkpoint's own Hugging Face image processor.

    Raises:
        StartupError: the checkpoint has none, or it needs code from the Hub.
    """
    # Here: it is slow to import, and not all plugins need it. From its module: without torchvision
    # the one at transformers' top is a placeholder that raises, in 5.17 and before at least.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(checkpoint, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError) as error:
        raise StartupError(
            f"the checkpoint has no usable image processor: {checkpoint} ({one_line(error)}). "
            "Add its preprocessor_config.json."
        ) from error


def map_image(
    ctx: ModelContext, image: Image.Image, options: Mapping[str, Any] | None = None
) -> dict[str, Tensor]:
    """Return what the checkpoint's image processor makes of one RGB image, without batch dim.

    `options` are keywords of its call, which a request asked for.

    Raises:
        RequestError: the image's shape is beyond what the processor can handle, or it can't take
            the options.
    """
    processor = image_processor(ctx.checkpoint)
    _check_shape(image, processor)
    if options:
        try:
            features = processor(images=image, return_tensors="pt", **options)
        except Exception as error:  # values of any kind, in any part of the library
            raise RequestError(
                f"the image processor can't take these options ({type(error).__name__}). "
                "Change or leave out mm_processor_kwargs.",
                param="mm_processor_kwargs",
            ) from error
        return _tensors(features)
    try:
        features = processor(images=image, return_tensors="pt")
    except ValueError as error:
        raise RequestError(
            f"an image can't be processed: {image.width}x{image.height} pixels "
            f"({one_line(error)}). Send one of a more usual shape.",
            param="messages",
        ) from error
    return _tensors(features)


def option_names(checkpoint: Path) -> frozenset[str]:
    """The keywords that the image processor's call knows."""
    kwargs = getattr(type(image_processor(checkpoint)), "valid_kwargs", None)
    own = {"return_tensors", "device", "data_format", "input_data_format", "disable_grouping"}
    return frozenset(getattr(kwargs, "__annotations__", ())) - own


def _tensors(features: Mapping[str, Any]) -> dict[str, Tensor]:
    return {
        name: value[0]
        for name, value in features.items()
        if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == 1
    }


@functools.lru_cache(maxsize=8)
def mapper_options(checkpoint: Path) -> str:
    """Return the image processor's class and options as one string, for content keys."""
    processor = image_processor(checkpoint)
    cls = type(processor)
    options = json.dumps(processor.to_dict(), sort_keys=True, default=str)
    return f"{cls.__module__}.{cls.__qualname__} {options}"


def expand_to_max_tokens(
    ctx: ModelContext, inputs: PromptInputs, max_tokens: Callable[[str], int]
) -> PromptInputs:
    """Turn each image's placeholder token into `max_tokens` of them.

    Raises:
        RequestError: the prompt doesn't have one placeholder for each image.
        StartupError: the model has items other than images; its plugin must place them.
    """
    others = sorted(set(inputs.mapped) - {"image"})
    if others:
        raise StartupError(
            f"input_processor is not implemented, and its default knows images only: {others}. "
            "Implement it in the plugin."
        )
    counts = [max_tokens("image")] * len(inputs.mapped.get("image", ()))
    return expand_placeholders(inputs, placeholder_token_id(ctx), counts, text=image_token(ctx))


def largest_images(
    ctx: ModelContext, seq_len: int, counts: Mapping[str, int], max_tokens: Callable[[str], int]
) -> PromptInputs:
    """Return the largest images that the processor doesn't shrink, then text up to `seq_len`.

    Raises:
        StartupError: not even one image fits.
    """
    size = _largest(ctx) if counts.get("image") else (0, 0)
    return dummy_prompt(ctx, seq_len, counts, max_tokens, size=size)


def _largest(ctx: ModelContext) -> tuple[int, int]:
    """Return width and height of an image that the processor doesn't have to shrink."""
    processor = image_processor(ctx.checkpoint)
    sides = _sides(processor, "crop_size") or _sides(processor, "size")
    height = sides.get("height") or sides.get("max_height") or 0
    width = sides.get("width") or sides.get("max_width") or 0
    edge = sides.get("longest_edge") or sides.get("shortest_edge") or FALLBACK_SIZE
    return (width or height or edge, height or width or edge)


def _sides(processor: Any, name: str) -> dict[str, int]:
    """Return an image processor's size option as a dict, without the entries that are unset."""
    size = getattr(processor, name, None)
    if isinstance(size, int):
        return {"height": size, "width": size}
    found = {} if size is None else dict(size)
    return {key: int(value) for key, value in found.items() if value}


def _check_shape(image: Image.Image, processor: Any) -> None:
    """Refuse an image that becomes enormous on its way to the model.

    One is padded to a square or scaled up by its short side: a strip of 2x100000 pixels would
    take gigabytes. A processor with `image_grid_pinpoints` fits every image into one of these
    sizes, whatever its shape.
    """
    short, long = sorted(image.size)
    if getattr(processor, "image_grid_pinpoints", None) and long <= MAX_SIDE:
        return
    if short >= 1 and long <= MAX_SIDE:
        if getattr(processor, "do_pad", False):
            num_pixels, short = long * long, long
        else:
            num_pixels = short * long
        sides = _sides(processor, "size")
        if "shortest_edge" in sides and "longest_edge" not in sides:
            num_pixels = max(num_pixels, sides["shortest_edge"] ** 2 * long // short)
        if num_pixels <= max(MAX_RESIZED_PIXELS, image.width * image.height):
            return
    raise RequestError(
        f"an image is too elongated to be processed: {image.width}x{image.height} pixels. "
        "Send one of a more usual shape.",
        param="messages",
    )
