"""The plugin under test, opened as far as a check needs it: each part is made once, when asked."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm_engine.config import EngineConfig, ModelContext
from mm_engine.errors import MMEngineError, StartupError
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.plugins.blame import may_be_the_users, one_line, place_of
from mm_engine.plugins.discovery import load
from mm_engine.plugins.placeholders import placeholder_token_id
from mm_engine.plugins.plugin import Plugin
from mm_engine.request import PromptInputs
from mm_engine.testing.fault import Fault, Skip, fault_of
from mm_engine.testing.oracle import Oracle, Refused
from mm_engine.testing.random_checkpoint import random_checkpoint
from mm_engine.testing.sizes import Geometry, geometry
from mm_engine.testing.target import Target
from mm_engine.worker.encoder import batch
from mm_engine.worker.loader import OpenedModel, load_model, open_model
from mm_engine.worker.model_runner import ModelRunner

HOOK_TIMEOUT = 10.0  # seconds that one call of a hook may take here
CPU = torch.device("cpu")


class Unlimited(Plugin):
    """The same hooks, with processors that may expand an item to more than `max_tokens`."""

    def max_tokens(self, ctx: ModelContext, modality: str) -> int:
        """Return the hook's answer where core's default processor needs it, else no limit."""
        own = super().max_tokens(ctx, modality)
        return sys.maxsize if "input_processor" in self.hooks else own


class Subject:
    """One plugin with one checkpoint, in float32 on the CPU."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self.no_oracle = ""  # why there is nothing to compare with
        self.memory: dict[str, Any] = {}  # what checks share with each other, by name

    @cached_property
    def loaded(self) -> Plugin:
        """The plugin's hooks, without a checkpoint."""
        return load(self.target.record, timeout=HOOK_TIMEOUT)

    @cached_property
    def checkpoint(self) -> tuple[Path, str]:
        """The checkpoint's folder and the format to load its weights in.

        Raises:
            Fault: the plugin brings none.
        """
        folder, record = self.target.folder, self.target.record
        if folder is None:
            if record.path is not None:
                remedy = 'give --model, or write TEST_CONFIG = "./tiny" into the file'
            else:
                remedy = (
                    "give --model, or add an entry point in the group mm_engine.test_configs: "
                    f'{record.architecture} = "your_package.tiny"'
                )
            hint = f"{remedy}; the folder holds a small config.json and preprocessor_config.json"
            raise Fault(None, None, "a checkpoint to check the plugin with", "none", hint)
        if not self.target.is_config:
            return folder, "auto"
        _ = self.loaded  # its import may register the config's class
        made, reason = random_checkpoint(folder)
        self.no_oracle = reason or ""
        return made, "dummy" if self.no_oracle else "auto"

    @cached_property
    def opened(self) -> OpenedModel:
        """Config, tokenizer and plugin."""
        folder, load_format = self.checkpoint
        config = EngineConfig(
            model=str(folder),
            dtype="float32",
            device="cpu",
            load_format=load_format,
            hook_timeout=HOOK_TIMEOUT,
            progress=False,
        )
        return open_model(config, self.target.record)

    @property
    def ctx(self) -> ModelContext:
        """What the hooks are told."""
        return self.opened.ctx

    @property
    def plugin(self) -> Plugin:
        """The hooks, checked by the engine at each call."""
        return self.opened.plugin

    @cached_property
    def pipeline(self) -> InputPipeline:
        """Prompts to requests, as the engine does it."""
        return InputPipeline(self.opened)

    @cached_property
    def unlimited(self) -> Unlimited:
        """The hooks, without the limit of `max_tokens`."""
        module = sys.modules[self.target.record.module]
        return Unlimited(self.target.record, module, timeout=HOOK_TIMEOUT)

    @cached_property
    def unlimited_pipeline(self) -> InputPipeline:
        """The pipeline, where an item may take more than `max_tokens`: that has its own check.

        It keeps nothing of what it mapped: checks ask twice to see whether hooks say the same.
        """
        config = dataclasses.replace(self.opened.config, mm_processor_cache_memory=0)
        opened = dataclasses.replace(self.opened, config=config, plugin=self.unlimited)
        return InputPipeline(opened)

    @cached_property
    def runner(self) -> ModelRunner:
        """The plugin's model with its weights, as the engine runs it."""
        runner = ModelRunner(self.opened, self.opened.config)
        self.memory["model class"] = type(runner.model)
        return runner

    @property
    def model(self) -> Any:
        """The plugin's model in float32."""
        return self.runner.model

    def model_in(self, dtype: torch.dtype) -> Any:
        """The plugin's model, loaded again in another dtype."""
        ctx = dataclasses.replace(self.ctx, dtype=dtype)
        return load_model(dataclasses.replace(self.opened, ctx=ctx), CPU).model

    @cached_property
    def placeholder_id(self) -> int:
        """The token that stands for an image."""
        return placeholder_token_id(self.ctx)

    @cached_property
    def oracle(self) -> Oracle | None:
        """transformers' model of the checkpoint; None without one: `no_oracle` says why."""
        if self.checkpoint[1] == "dummy":
            return None
        try:
            return Oracle(self.ctx.checkpoint, self.placeholder_id)
        except Refused as error:
            self.no_oracle = f"transformers can't load the checkpoint ({error})"
            return None

    def require_oracle(self) -> Oracle:
        """transformers' model.

        Raises:
            Skip: there is none, and why.
        """
        if self.oracle is None:
            raise Skip(self.no_oracle)
        return self.oracle

    @cached_property
    def geometry(self) -> Geometry:
        """The sizes at which the model's treatment of images may change."""
        from mm_engine.plugins.defaults import image_processor

        try:
            processor = image_processor(self.ctx.checkpoint)
        except StartupError:  # a plugin with a mapper of its own may do without
            processor = None
        return geometry(self.ctx.hf_config, processor)

    def map(self, image: Image.Image) -> dict[str, Tensor]:
        """The mapper's tensors of one image."""
        return self.plugin.map_item(self.ctx, "image", image)

    def expand(
        self, images: Sequence[Image.Image], tensors: Sequence[dict[str, Tensor]] | None = None
    ) -> list[int]:
        """How many tokens the processor gives each of `images`, in a prompt of nothing else."""
        return [len(ids) for ids in self.ranges(images, tensors)]

    def ranges(
        self, images: Sequence[Image.Image], tensors: Sequence[dict[str, Tensor]] | None = None
    ) -> list[tuple[int, ...]]:
        """The token ids that the processor gives each of `images`, as `expand` counts them."""
        data = {"image": tuple(images)}
        mapped = {"image": tuple(tensors or (self.map(image) for image in images))}
        ids = (self.placeholder_id,) * len(images)
        inputs = PromptInputs(prompt_token_ids=ids, multi_modal_data=data, mapped=mapped)
        result = self.unlimited.process(self.ctx, inputs)
        assert result.prompt_token_ids is not None
        places = sorted(result.placeholders, key=lambda place: place.item)
        return [result.prompt_token_ids[place.offset : place.end] for place in places]

    def text_in(self, ids: Sequence[int]) -> list[int]:
        """Positions of a range's text (separators, labels): what isn't the placeholder token.

        None where another token than the placeholder stands for the image's rows.
        """
        if self.placeholder_id not in ids:
            return []
        return [position for position, token in enumerate(ids) if token != self.placeholder_id]

    def embed(self, tensors: Sequence[dict[str, Tensor]], model: Any = None) -> list[Tensor]:
        """What `embed_images` makes of several items' tensors, unchecked.

        Raises:
            PluginError: it raised.
        """
        stacked = {name: batch([item[name] for item in tensors]) for name in tensors[0]}
        try:
            with torch.inference_mode():
                found = (model or self.model).embed_images(**stacked)
        except MMEngineError:
            raise
        except BaseException as error:  # SystemExit too: a plugin doesn't end the kit
            if may_be_the_users(error):
                raise
            raise self.plugin.blame("embed_images", f"raised {one_line(error)}", error) from error
        if not isinstance(found, list | tuple | Tensor) or len(found) != len(tensors):
            count = f"{len(found)} of them" if isinstance(found, list | tuple | Tensor) else found
            raise self.plugin.blame(
                "embed_images", f"expected {len(tensors)} tensors, one for each image, got {count}"
            )
        return list(found)

    def blame(self, hook: str, expected: str, got: str, hint: str = "") -> Fault:
        """Return the fault of `hook` (or of a method of the model), with its place.

        The place of a method that the model has from mm-engine is the model's class.
        """
        fault = fault_of(self.plugin.blame(hook, "…"))
        model_class = self.memory.get("model class")
        method = getattr(model_class, hook, None)
        if model_class is not None and getattr(method, "__module__", "").startswith("mm_engine."):
            fault.place = place_of(model_class)
        return Fault(fault.hook, fault.place, expected, got, hint)
