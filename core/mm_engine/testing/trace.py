"""One request on its way through a plugin's hooks, written down: `engine plugins trace`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from mm_engine.config import EngineConfig
from mm_engine.engine.build import build_engine
from mm_engine.errors import MMEngineError
from mm_engine.inputs.pipeline import InputPipeline, PreparedPrompt
from mm_engine.models.checkpoint import locate, read_architecture
from mm_engine.plugins.discovery import demos, find
from mm_engine.plugins.placeholders import placeholder_token_id
from mm_engine.plugins.plugin import HookCall
from mm_engine.plugins.registration import hook_names
from mm_engine.request import Item, PromptInputs
from mm_engine.sampling_params import SamplingParams
from mm_engine.worker.loader import open_model

MIN_RUN = 3  # equal ids in a row that are written as `id×n`
MAX_ROW = 8  # other ids that stand in one row


@dataclass(frozen=True, slots=True)
class TokenRow:
    """Some tokens that follow each other: `count` times one id, or several ids once each."""

    position: int
    token_ids: tuple[int, ...]
    count: int
    text: str
    item: str | None = None  # `image 0`, where they are its placeholder


@dataclass(frozen=True, slots=True)
class TracedTensor:
    """One of the mapper's tensors."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TracedItem:
    """One item: where it is in the prompt and what it was mapped to."""

    modality: str
    index: int
    width: int  # pixels, as given
    height: int
    offset: int
    num_tokens: int
    max_tokens: int  # what the hook says
    content_key: str
    tensors: tuple[TracedTensor, ...]


@dataclass(frozen=True, slots=True)
class TracedHook:
    """A hook's calls for the request; what is asked once at startup has no `again_seconds`."""

    hook: str
    place: str
    num_calls: int
    first_seconds: float
    again_seconds: float | None  # the same request a second time: nothing is loaded any more


@dataclass(frozen=True, slots=True)
class TracedRun:
    """The request's first token, computed."""

    first_step_seconds: float  # encoding included
    num_steps: int  # until there is a token; a long prompt takes several
    token_id: int
    text: str


@dataclass(slots=True)
class Trace:
    """All that there is to see of one request, as far as it came."""

    model: str
    plugin: str
    architecture: str
    prompt: str
    before: list[TokenRow] = field(default_factory=list)
    after: list[TokenRow] = field(default_factory=list)
    num_before: int = 0
    num_after: int = 0
    items: list[TracedItem] = field(default_factory=list)
    hooks: list[TracedHook] = field(default_factory=list)
    run: TracedRun | None = None
    error: str | None = None  # what ended it


def trace(
    config: EngineConfig,
    prompt: str,
    images: Sequence[Image.Image],
    *,
    run: bool = False,
    on_plugin: Callable[[str], object] | None = None,
) -> Trace:
    """Send a question with `images` through the hooks; with `run` also compute the first token.

    An error of the request or of a hook ends the trace and is part of it. `on_plugin` is told which
    plugin it is before anything of it is imported.

    Raises:
        StartupError: the model can't be opened.
        PluginError: the plugin can't be loaded.
    """
    if on_plugin is not None:
        bundled = demos()
        path = bundled[config.model] if config.model in bundled else locate(config.model)
        on_plugin(find(read_architecture(path), config.plugins).label)
    # Nothing that a mapper made is kept: the second call is to reach it.
    opened = open_model(dataclasses.replace(config, mm_processor_cache_memory=0))
    first: list[HookCall] = []
    opened.plugin.observer = first.append
    found = Trace(config.model, opened.plugin.label, opened.ctx.architecture, prompt)
    again: list[HookCall] = []
    encoded: list[HookCall] = []
    try:
        pipeline = InputPipeline(opened)
        sizes = [image.size for image in images]
        limit = opened.plugin.max_tokens(opened.ctx, "image")
        question = _Question(pipeline, prompt, images)
        found.prompt, ids = question.encode()
        token = placeholder_token_id(opened.ctx)
        places = [position for position, each in enumerate(ids) if each == token]
        found.num_before = len(ids)
        found.before = _rows(pipeline, ids, {at: f"image {i}" for i, at in enumerate(places)})
        prepared = question.prepare()
        found.num_after = len(prepared.prompt_token_ids)
        found.after = _rows(pipeline, prepared.prompt_token_ids, _names(prepared.items))
        found.items = [_item(item, sizes[item.placeholder.item], limit) for item in prepared.items]
        opened.plugin.observer = again.append
        question.prepare()
        if run:
            opened.plugin.observer = None
            request = pipeline.request(prepared, SamplingParams(max_tokens=1, temperature=0.0))
            engine = build_engine(opened, config, pipeline.dummy_request())
            opened.plugin.observer = encoded.append
            found.run = _run(engine, request, pipeline)
    except MMEngineError as error:
        found.error = " ".join(str(error).split())
    finally:
        opened.plugin.observer = None
    found.hooks = [*_hooks(first, again), *_hooks(encoded, [])]
    return found


class _Question:
    """The prompt as a chat where the checkpoint has a template, else as raw text."""

    def __init__(self, pipeline: InputPipeline, prompt: str, images: Sequence[Image.Image]) -> None:
        self.pipeline = pipeline
        self.images = tuple(images)
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        self.messages = [{"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]
        plugin, ctx = pipeline.plugin, pipeline.ctx
        marks = [plugin.placeholder_text(ctx, "image", index) for index in range(len(images))]
        self.raw = "\n".join([*marks, prompt])

    def encode(self) -> tuple[str, tuple[int, ...]]:
        """Text and ids, one placeholder for each image."""
        if self.pipeline.chat.template is not None:
            return self.pipeline.chat.encode(self.messages)
        return self.raw, tuple(self.pipeline.ctx.tokenizer(self.raw)["input_ids"])

    def prepare(self) -> PreparedPrompt:
        """The same, with the items mapped and their placeholders expanded."""
        if self.pipeline.chat.template is not None:
            return self.pipeline.prepare_chat(self.messages)
        data = {"image": self.images} if self.images else {}
        return self.pipeline.prepare(PromptInputs(prompt=self.raw, multi_modal_data=data))


def _names(items: Sequence[Item]) -> dict[int, str]:
    """Position -> which item's placeholder is there."""
    return {
        position: f"{item.modality} {item.placeholder.item}"
        for item in items
        for position in range(item.placeholder.offset, item.placeholder.end)
    }


def _rows(pipeline: InputPipeline, ids: Sequence[int], names: dict[int, str]) -> list[TokenRow]:
    return [
        TokenRow(start, tuple(shown), count, _text(pipeline, shown), names.get(start))
        for start, shown, count in _runs(ids, names)
    ]


def _text(pipeline: InputPipeline, ids: Sequence[int]) -> str:
    return str(pipeline.ctx.tokenizer.decode(list(ids)))


def _runs(ids: Sequence[int], names: dict[int, str]) -> Iterator[tuple[int, list[int], int]]:
    """Yield (position, ids, count): runs of one id in one range, and the others in short rows."""
    others: list[int] = []
    position = 0
    while position < len(ids):
        end = position
        while (
            end < len(ids) and ids[end] == ids[position] and names.get(end) == names.get(position)
        ):
            end += 1
        alone = end - position >= MIN_RUN or position in names
        if others and (alone or len(others) >= MAX_ROW):
            yield position - len(others), others, 1
            others = []
        if alone:
            yield position, [ids[position]], end - position
            position = end
        else:
            others.append(ids[position])
            position += 1
    if others:
        yield position - len(others), others, 1


def _item(item: Item, size: tuple[int, int], limit: int) -> TracedItem:
    tensors = tuple(
        TracedTensor(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
        for name, tensor in item.tensors.items()
    )
    place = item.placeholder
    return TracedItem(
        item.modality,
        place.item,
        *size,
        place.offset,
        place.length,
        limit,
        item.content_key,
        tensors,
    )


def _hooks(first: Sequence[HookCall], again: Sequence[HookCall]) -> list[TracedHook]:
    order = [*hook_names(), *dict.fromkeys(call.hook for call in first)]
    called = sorted({(call.hook, call.place) for call in first}, key=lambda c: order.index(c[0]))
    traced = []
    for hook, place in called:
        calls = [call.seconds for call in first if (call.hook, call.place) == (hook, place)]
        later = [call.seconds for call in again if (call.hook, call.place) == (hook, place)]
        traced.append(
            TracedHook(hook, place, len(calls), sum(calls), sum(later) if later else None)
        )
    return traced


def _run(engine: Any, request: Any, pipeline: InputPipeline) -> TracedRun:
    engine.add(request)
    start = time.perf_counter()
    outputs = engine.step()
    seconds = time.perf_counter() - start
    num_steps = 1
    ids: list[int] = []
    while True:
        for output in outputs:
            if output.error is not None:
                raise MMEngineError(output.error.message)
            ids += [token for new in output.outputs for token in new.token_ids]
        if ids or not engine.has_work:
            break
        outputs, num_steps = engine.step(), num_steps + 1
    return TracedRun(seconds, num_steps, ids[0], _text(pipeline, ids[:1]))
