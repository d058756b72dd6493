"""mm-engine: a serving engine for vision-language models in which a model is a pip package."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mm_engine import torch_threads as torch_threads  # before torch is imported by anything else

if TYPE_CHECKING:
    from mm_engine.llm import LLM
    from mm_engine.outputs import CompletionOutput, RequestOutput
    from mm_engine.sampling_params import SamplingParams

__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "StructuredOutputsParams"]

_HOMES = {
    "LLM": "mm_engine.llm",
    "CompletionOutput": "mm_engine.outputs",
    "RequestOutput": "mm_engine.outputs",
    "SamplingParams": "mm_engine.sampling_params",
    "StructuredOutputsParams": "mm_engine.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Import the public names when they are first used: `engine --help` needs no torch."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
