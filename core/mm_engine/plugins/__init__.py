"""What a plugin imports from mm-engine, and how the engine finds and calls plugins."""

from mm_engine.config import ModelContext
from mm_engine.errors import RequestError, StartupError
from mm_engine.plugins.dummy import dummy_prompt
from mm_engine.plugins.hookspecs import hookimpl
from mm_engine.plugins.image_processors import image_processor
from mm_engine.plugins.placeholders import (
    expand_placeholders,
    image_token,
    placeholder_token_id,
)
from mm_engine.request import PlaceholderRange, PromptInputs

__all__ = [
    "ModelContext",
    "PlaceholderRange",
    "PromptInputs",
    "RequestError",
    "StartupError",
    "dummy_prompt",
    "expand_placeholders",
    "hookimpl",
    "image_processor",
    "image_token",
    "placeholder_token_id",
]
