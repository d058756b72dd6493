"""Flags that say which engine is measured, and how it runs."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any

import typer

from mm_engine.cli import options
from mm_engine.cli.model_choice import choose_model
from mm_engine.config import DEFAULT_LIMITS, SERVED_DECODE_SLOWDOWN


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
    attention_backend: options.AttentionBackend = "auto"
    tensor_parallel_size: options.TensorParallelSize = 1
    quantization: options.Quantization = None
    packed_cache: options.PackedCache = None
    max_model_len: options.MaxModelLen = None
    load_format: options.LoadFormat = "auto"
    plugin: options.Plugins = None
    max_num_seqs: options.MaxNumSeqs = 64
    max_num_batched_tokens: options.MaxNumBatchedTokens = 2048
    block_size: options.BlockSize = 16
    max_decode_slowdown: Annotated[
        float | None,
        typer.Option(
            callback=options.check_slowdown,
            help=f"{options.SLOWDOWN_HELP} Default: {SERVED_DECODE_SLOWDOWN:g} for serve and "
            "startup, as engine serve has it; inf for latency and throughput, as LLM.",
            show_default=False,
            rich_help_panel=options.MEMORY_PANEL,
        ),
    ] = None
    kv_cache_memory: options.KVCacheMemory = None
    kv_cache_dtype: options.KVCacheDtype = "auto"
    enable_prefix_caching: options.EnablePrefixCaching = True
    encoder_cache_memory: options.EncoderCacheMemory = None
    mm_processor_cache_memory: options.MMProcessorCacheMemory = "256MiB"
    speculative_config: options.SpeculativeConfig = None
    async_scheduling: options.AsyncScheduling = None
    enforce_eager: options.EnforceEager = False
    memory_utilization: options.MemoryUtilization = 0.9

    def of_server(self) -> EngineFlags:
        """These, and what isn't given as `engine serve` has it."""
        return self._with_slowdown(SERVED_DECODE_SLOWDOWN)

    def of_llm(self) -> EngineFlags:
        """These, and what isn't given as `LLM` has it."""
        return self._with_slowdown(math.inf)

    def _with_slowdown(self, default: float) -> EngineFlags:
        given = self.max_decode_slowdown
        slowdown = default if given is None else given
        return dataclasses.replace(self, max_decode_slowdown=slowdown)

    def name(self) -> str:
        """The model to run: the one named, or the demo.

        Raises:
            StartupError: none is named and no installed package bundles one.
        """
        return choose_model(self.model)[0]

    def options(self, *, num_images: int = 0) -> dict[str, Any]:
        """Keywords of `LLM` and `EngineConfig`, without the model; `num_images` fit a prompt.

        For flags from `of_server` or `of_llm`.

        Raises:
            StartupError: a flag can't be read.
        """
        assert self.max_decode_slowdown is not None
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["model"]
        limit = max(num_images, DEFAULT_LIMITS["image"])
        return {**options.engine_options(**values), "limit_mm_per_prompt": {"image": limit}}

    def given(self) -> list[str]:
        """The flags that differ from their defaults, apart from --model."""
        return [
            f"--{field.name.replace('_', '-')}"
            for field in dataclasses.fields(self)
            if field.name != "model" and getattr(self, field.name) != field.default
        ]
