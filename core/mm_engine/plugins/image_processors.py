"""The checkpoint's own image processor, for plugins whose mapper calls it in its own way."""

from __future__ import annotations

from typing import Any

from mm_engine.config import ModelContext


def image_processor(ctx: ModelContext) -> Any:
    """Return the checkpoint's own Hugging Face image processor; it is read once.

    For a mapper that wants other options of it than preprocessor_config.json has, or more than
    the default mapper takes: of an image that becomes several pictures it takes none. Its
    attributes (`size`, `max_patches`, …) tell the other hooks how images are laid out.

    Raises:
        StartupError: the checkpoint has none, or it needs code from the Hub.
    """
    from mm_engine.plugins.defaults import image_processor as read  # here: it needs torch

    return read(ctx.checkpoint)
