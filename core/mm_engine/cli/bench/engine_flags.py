"""Flags that say which engine is measured, and how it runs."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import typer

from mm_engine.cli import options
from mm_engine.cli.model_choice import choose_model
from mm_engine.config import DEFAULT_LIMITS


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """The engine that is measured. Each field but `model` is an option of `LLM` by that name."""

    model: Annotated[
        str | None,
        typer.Option(
            "-m",
            "--model",
            help="A checkpoint's folder, a Hub id, or a bundled demo's name. Default: the demo.",
            show_default=False,
            rich_help_panel=options.MODEL_PANEL,
        ),
    ] = None
    dtype: options.Dtype = "auto"
    device: options.Device = "auto"
    max_model_len: options.MaxModelLen = None
    load_format: options.LoadFormat = "auto"
    plugin: options.Plugins = None
    max_num_seqs: Annotated[
        int,
        typer.Option(min=1, help="Sequences in one step.", rich_help_panel=options.MEMORY_PANEL),
    ] = 64
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens in one step, prompts and answers together.",
            rich_help_panel=options.MEMORY_PANEL,
        ),
    ] = 2048
    block_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="Tokens in one block of the KV cache.",
            rich_help_panel=options.MEMORY_PANEL,
        ),
    ] = 16
    max_decode_slowdown: options.MaxDecodeSlowdown = math.inf
    kv_cache_memory: options.KVCacheMemory = None
    enable_prefix_caching: Annotated[
        bool,
        typer.Option(
            help="Keep what was computed of prompts for others that begin alike.",
            rich_help_panel=options.MEMORY_PANEL,
        ),
    ] = True
    encoder_cache_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="For features of images, kept for prompts that bring the same ones. "
            "Default: 128MiB, or what a step needs.",
            rich_help_panel=options.MEMORY_PANEL,
        ),
    ] = None
    mm_processor_cache_memory: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="For images as the image processor made them, in each of the two processes; "
            "0 keeps none.",
            rich_help_panel=options.MEMORY_PANEL,
        ),
    ] = "256MiB"
    speculative_config: options.SpeculativeConfig = None
    memory_utilization: Annotated[
        float,
        typer.Option(
            "--memory-utilization",
            "--gpu-memory-utilization",
            min=0.01,
            max=1.0,
            help="Share of the device's memory to use.",
            rich_help_panel=options.MEMORY_PANEL,
        ),
    ] = 0.9

    def name(self) -> str:
        """The model to run: the one named, or the demo.

        Raises:
            StartupError: none is named and no installed package bundles one.
        """
        return choose_model(self.model)[0]

    def options(self, *, num_images: int = 0) -> dict[str, Any]:
        """Keywords of `LLM` and `EngineConfig`, without the model; `num_images` fit a prompt.

        Raises:
            StartupError: a size of memory is none.
        """
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["model"]
        values["plugins"] = tuple(values.pop("plugin") or ())
        for name in ("kv_cache_memory", "encoder_cache_memory", "mm_processor_cache_memory"):
            if values[name] is not None:
                flag, least = _flag(name), 0 if name.startswith("mm_") else 1
                values[name] = options.parse_size(values[name], flag, least=least)
        values.update(options.parse_speculation(values.pop("speculative_config")))
        limit = max(num_images, DEFAULT_LIMITS["image"])
        return {**values, "limit_mm_per_prompt": {"image": limit}}

    def given(self) -> list[str]:
        """The flags that differ from their defaults, apart from --model."""
        return [
            _flag(field.name)
            for field in dataclasses.fields(self)
            if field.name != "model" and getattr(self, field.name) != field.default
        ]


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
