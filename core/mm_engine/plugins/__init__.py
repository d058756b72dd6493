"""What a plugin imports from mm-engine, and how the engine finds and calls plugins."""

from mm_engine.config import ModelContext
from mm_engine.errors import RequestError
from mm_engine.plugins.hookspecs import hookimpl
from mm_engine.plugins.placeholders import expand_placeholders, placeholder_token_id
from mm_engine.request import PlaceholderRange, PromptInputs

__all__ = [
    "ModelContext",
    "PlaceholderRange",
    "PromptInputs",
    "RequestError",
    "expand_placeholders",
    "hookimpl",
    "placeholder_token_id",
]
