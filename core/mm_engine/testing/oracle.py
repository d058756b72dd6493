"""transformers on the same checkpoint, in float32: what a plugin's model is compared with."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING
from transformers.utils import logging

from mm_engine.errors import MMEngineError
from mm_engine.plugins.blame import one_line
from mm_engine.plugins.defaults import image_processor


class Refused(Exception):
    """transformers can't take this image or prompt itself, and why."""


@dataclass(slots=True)
class ModuleCall:
    """What went into a module and what came out, over all calls of it."""

    name: str
    inputs: list[Tensor] = field(default_factory=list)  # the first tensor of each call
    outputs: list[Tensor] = field(default_factory=list)
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)


class Oracle:
    """transformers' model and image processor for a checkpoint."""

    def __init__(self, checkpoint: Path, placeholder_id: int) -> None:
        """Load the model.

        Raises:
            Refused: transformers has no model for the checkpoint or can't load it.
        """
        try:
            with quiet():
                # Eager: older versions choose "sdpa" for all, which leaves out soft caps.
                self.model: Any = AutoModelForImageTextToText.from_pretrained(
                    checkpoint,
                    dtype=torch.float32,
                    attn_implementation="eager",
                    trust_remote_code=False,
                ).eval()
            self.image_processor = image_processor(checkpoint)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
            raise Refused(one_line(error)) from error
        except (MMEngineError, RuntimeError) as error:
            raise Refused(str(error)) from error
        self.options = processor_options(self.model.config)
        self.model.requires_grad_(False)
        self.base: Any = getattr(self.model, "model", self.model)
        self.placeholder_id = placeholder_id

    def mapped(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """What the image processor makes of `images`, batched, with the processor's options.

        Raises:
            Refused: it doesn't take them.
        """
        try:
            features = self.image_processor(
                images=list(images), **self.options, return_tensors="pt"
            )
        except Exception as error:  # of a shape that it wasn't written for
            raise Refused(one_line(error)) from error
        return {name: value for name, value in features.items() if isinstance(value, Tensor)}

    def rows(self, image: Image.Image) -> Tensor:
        """`[num_tokens, hidden]`: what `get_image_features` makes of one image.

        Raises:
            Refused: transformers fails on it.
        """
        tensors = self.mapped([image])
        names = inspect.signature(self.base.get_image_features).parameters
        tensors = {name: value for name, value in tensors.items() if name in names}
        try:
            with torch.inference_mode():
                found = self.base.get_image_features(**tensors, return_dict=True)
        except Exception as error:
            raise Refused(one_line(error)) from error
        found = getattr(found, "pooler_output", found)
        parts = [found] if isinstance(found, Tensor) else list(found)
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])

    def inputs(self, ids: Sequence[int], images: Sequence[Image.Image]) -> dict[str, Any]:
        """Keywords of the model for a prompt with one placeholder for each image.

        Raises:
            Refused: transformers fails on one of the images.
        """
        counts = iter([len(self.rows(image)) for image in images])
        expanded: list[int] = []
        for token in ids:
            expanded += [token] * (next(counts) if token == self.placeholder_id else 1)
        return self.inputs_of(expanded, images)

    def inputs_of(self, expanded: Sequence[int], images: Sequence[Image.Image]) -> dict[str, Any]:
        """Keywords of the model for a prompt whose placeholders are expanded.

        Raises:
            Refused: transformers fails on one of the images.
        """
        batch = torch.tensor([list(expanded)])
        inputs: dict[str, Any] = {"input_ids": batch, "attention_mask": torch.ones_like(batch)}
        if images:
            names = inspect.signature(self.model.forward).parameters
            tensors = self.mapped(images)
            inputs |= {name: value for name, value in tensors.items() if name in names}
        return inputs

    def answer(self, inputs: Mapping[str, Any], num_tokens: int) -> list[int]:
        """Greedy ids, end of sequence ignored.

        Raises:
            Refused: transformers fails on it.
        """
        try:
            with torch.inference_mode():
                ids = self.model.generate(
                    **inputs, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
                )
        except Exception as error:
            raise Refused(one_line(error)) from error
        answer: list[int] = ids[0, inputs["input_ids"].shape[1] :].tolist()
        return answer

    def logits(self, inputs: Mapping[str, Any]) -> Tensor:
        """`[vocab]`: the logits after the prompt.

        Raises:
            Refused: transformers fails on it.
        """
        try:
            with torch.inference_mode():
                logits: Tensor = self.model(**inputs).logits[0, -1]
        except Exception as error:
            raise Refused(one_line(error)) from error
        return logits

    def calls(self, image: Image.Image) -> tuple[Tensor, list[ModuleCall]]:
        """The rows of `image`, and the parts of the model that made them, in order of call."""
        with recorded(dict(self.base.named_children())) as calls:
            rows = self.rows(image)
        return rows, list(calls.values())

    def merged(self, inputs: Mapping[str, Any]) -> tuple[Tensor | None, Tensor]:
        """`[num_tokens, hidden]` that the text backbone is given, and the last logits `[vocab]`."""
        seen: list[Tensor] = []

        def note(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if isinstance(kwargs.get("inputs_embeds"), Tensor):
                seen.append(kwargs["inputs_embeds"][0].clone())

        hooks = [
            child.register_forward_pre_hook(note, with_kwargs=True)
            for child in self.base.children()
        ]
        try:
            logits = self.logits(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return (seen[0] if seen else None), logits

    def reaching(self, tensors: Mapping[str, Tensor], inputs: Mapping[str, Any]) -> list[str]:
        """Those of a checkpoint's `tensors` that the logits of a prompt depend on."""
        own = dict(self.model.named_parameters())
        twins: dict[str, nn.Parameter] = {}
        for name, tensor in tensors.items():
            equal = [
                (_common_end(name, other), other)
                for other, parameter in own.items()
                if parameter.shape == tensor.shape and torch.equal(parameter, tensor.to(parameter))
            ]
            if equal:
                twins[name] = own[max(equal)[1]]
        if not twins:
            return []
        for parameter in twins.values():
            parameter.requires_grad_(True)
        try:
            loss = self.model(**inputs).logits[0, -1].square().sum()
            if not loss.requires_grad:
                return []
            gradients = torch.autograd.grad(loss, list(twins.values()), allow_unused=True)
        finally:
            self.model.requires_grad_(False)
        found = zip(twins, gradients, strict=True)
        return [name for name, grad in found if grad is not None and bool(grad.any())]


def _common_end(first: str, second: str) -> int:
    """How many characters two names have in common at their ends."""
    pairs = zip(reversed(first), reversed(second), strict=False)
    return next((n for n, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def processor_options(config: Any) -> dict[str, Any]:
    """The options that transformers' processor for `config` hands to the image processor.

    They win over those of preprocessor_config.json: a processor may have images cut into tiles
    though the image processor's own option says that they aren't.
    """
    processor: Any = PROCESSOR_MAPPING.get(type(config), None)
    if processor is None:
        return {}
    options = getattr(processor, "images_kwargs", None)
    if options is None:  # older versions of transformers keep them beside the class
        beside = vars(sys.modules[processor.__module__]).get(f"{processor.__name__}Kwargs")
        options = getattr(beside, "_defaults", {}).get("images_kwargs", {})
    return {name: value for name, value in options.items() if name != "return_tensors"}


@contextmanager
def recorded(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, ModuleCall]]:
    """Note what goes in and out of `modules`; the result is filled in order of call."""
    calls: dict[str, ModuleCall] = {}
    hooks = []
    for name, module in modules.items():

        def note(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any, name: str = name
        ) -> None:
            call = calls.setdefault(name, ModuleCall(name))
            given = next((v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)), None)
            got = out if isinstance(out, Tensor) else getattr(out, "last_hidden_state", None)
            got = out[0] if isinstance(out, tuple) else got
            if given is not None:
                call.inputs.append(given.detach().clone())
            if isinstance(got, Tensor):
                call.outputs.append(got.detach().clone())
            call.arguments.append((args, kwargs))

        hooks.append(module.register_forward_hook(note, with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def quiet() -> Iterator[None]:
    """Without transformers' progress bars."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
