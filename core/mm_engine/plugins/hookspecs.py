"""The hooks: all that mm-engine ever asks of a plugin. A plugin is a module with these functions.

`ctx` is the `ModelContext` of the model being served. Implement `model_class` and `max_tokens`;
every other hook has a default that serves models with one size of image. A hook may leave out the
arguments that it doesn't need. `ctx` and all in it serve every request: no hook may write to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mm_engine.config import ModelContext
    from mm_engine.request import PromptInputs

PROJECT = "mm_engine"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)

#: `mapper(ctx, item)`: one decoded item (a PIL image) to the keyword tensors of `embed_images`.
Mapper = Callable[["ModelContext", Any], "dict[str, Tensor]"]
Register = Callable[[str, Mapper], None]


@hookspec(firstresult=True)
def model_class(ctx: ModelContext) -> type[nn.Module]:
    """Return the class of the model: an `nn.Module` with `SupportsVision`, built as `cls(ctx)`.

    Called once in the engine process, before weights are loaded. Required.
    """
    raise AssertionError("a hookspec is never called")


@hookspec(firstresult=True)
def max_tokens(ctx: ModelContext, modality: str) -> int:
    """Return the most prompt tokens that one item of `modality` can take, at least 1.

    Called at startup; no item may ever be expanded to more. Required.
    """
    raise AssertionError("a hookspec is never called")


@hookspec(firstresult=True)
def register_input_mapper(ctx: ModelContext, register: Register) -> None:
    """Call `register(modality, mapper)` for each modality whose items you map to tensors yourself.

    `mapper(ctx, item)` turns one item (an RGB image), alone, into a dict of tensors on the CPU:
    the keywords of `embed_images`, without a batch dimension, the same ones for each item. It has
    30 s (`hook_timeout`), may be called from several threads, and raises `RequestError` where the
    item is at fault. This hook is called at startup in each process that maps items. A mapper with
    a third parameter `options` gets the `mm_processor_kwargs` of requests that bring some: only
    names that the operator allowed, with values of any kind.
    Not implemented: the checkpoint's own Hugging Face image processor.
    """
    raise AssertionError("a hookspec is never called")


@hookspec(firstresult=True)
def input_processor(ctx: ModelContext, inputs: PromptInputs) -> PromptInputs:
    """Return `inputs` with each item's placeholder expanded and its range in `placeholders`.

    Called for each prompt with items, after the mapper and with the same time limit.
    `inputs.prompt_token_ids` holds one placeholder token for each item, `inputs.multi_modal_data`
    the RGB images and `inputs.mapped` their tensors. Must not change what it is given, nor a token
    outside of the ranges; `expand_placeholders` does the work for most models.
    Not implemented: each placeholder token becomes `max_tokens` of them.
    """
    raise AssertionError("a hookspec is never called")


@hookspec(firstresult=True)
def dummy_data(ctx: ModelContext, seq_len: int, counts: Mapping[str, int]) -> PromptInputs:
    """Return the costliest prompt with `counts[modality]` items, as a user would send it.

    Called once at startup; the prompt passes the mapper and the processor like any request and
    must then be at least `seq_len` tokens long. Its run through the model measures peak memory.
    Not implemented: the largest image that the processor admits, then text up to `seq_len`.
    """
    raise AssertionError("a hookspec is never called")


@hookspec(firstresult=True)
def placeholder_text(ctx: ModelContext, modality: str, index: int) -> str:
    """Return the text that stands for item number `index` (from 0) of `modality` in a prompt.

    Called when a chat is rendered: the text takes the place of the bare image token that a chat
    template writes, or of the image where a template takes strings only. In a raw prompt the
    caller writes it. It must contain the placeholder token exactly once; what stands around that
    (markers such as `<img>` and `</img>`) is text of the prompt.
    Not implemented: the tokenizer's image token.
    """
    raise AssertionError("a hookspec is never called")
