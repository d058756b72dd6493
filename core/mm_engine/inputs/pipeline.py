"""Prompt and images in, a `Request` out: the hooks are called here, in the front process."""

from __future__ import annotations

import dataclasses
import functools
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor

from mm_engine.errors import RequestError, StartupError
from mm_engine.inputs.chat import ChatRenderer, read_template
from mm_engine.inputs.hashing import content_key
from mm_engine.inputs.media import to_rgb
from mm_engine.inputs.processed_items import ProcessedItems
from mm_engine.plugins.placeholders import placeholder_token_id
from mm_engine.request import Item, PromptInputs, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.worker.grammars import Grammars
from mm_engine.worker.loader import OpenedModel, pick_device

MIN_TEXT = 2**20  # bytes that are tokenized at once, however short the model's length is
TEXT_PER_TOKEN = 16  # bytes for each token of the model's length: several times what texts have


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt that the engine can take: ids with placeholders expanded, items mapped."""

    prompt: str | None  # as rendered, placeholders not expanded
    prompt_token_ids: tuple[int, ...]
    items: tuple[Item, ...] = ()
    cache_salt: str = ""  # nothing is shared between prompts of different salts


class InputPipeline:
    """Turns prompts into requests for one model. Its calls block; threads may share it."""

    def __init__(self, opened: OpenedModel, *, chat_template: str | None = None) -> None:
        self.opened = opened
        self.ctx = opened.ctx
        self.plugin = opened.plugin
        self.max_len = opened.ctx.max_model_len  # prompt and output together, tokens
        self.vocab_size = int(opened.ctx.text_config.vocab_size)
        #: Tensors of images that were mapped before.
        self.processed = ProcessedItems(opened.config.mm_processor_cache_memory)
        self.grammars = Grammars.of(opened)
        self._placeholder = placeholder_token_id(self.ctx)
        image_text = functools.partial(self.plugin.placeholder_text, self.ctx, "image")
        template = read_template(self.ctx, chat_template)
        try:
            self.chat = ChatRenderer(self.ctx, template, image_text)
        except RequestError as error:  # there is no request yet
            raise StartupError(str(error)) from error

    def limit_length(self, num_tokens: int) -> None:
        """Take no request longer than `num_tokens`: what the KV cache turned out to hold."""
        self.max_len = min(self.max_len, num_tokens)

    @property
    def max_text(self) -> int:
        """The most bytes of text in one prompt; to tokenize more only to refuse it takes long."""
        return max(MIN_TEXT, TEXT_PER_TOKEN * self.max_len)

    def prepare(
        self,
        inputs: PromptInputs,
        *,
        cache_salt: str = "",
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> PreparedPrompt:
        """Tokenize, map and expand one prompt. No cache shares it with another `cache_salt`.

        `mm_processor_kwargs` are options of the image mapper.

        Raises:
            RequestError: the prompt or one of its items is at fault.
            PluginError: a hook is.
        """
        ids = inputs.prompt_token_ids
        if (ids is None) == (inputs.prompt is None):
            raise RequestError("give either a prompt or prompt_token_ids.", param="prompt")
        if ids is None:
            self._check_size([inputs.prompt])
            ids = self._tokenize(inputs.prompt)
        return self._expand(
            inputs.prompt, ids, inputs.multi_modal_data, cache_salt, mm_processor_kwargs or {}
        )

    def prepare_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        cache_salt: str = "",
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> PreparedPrompt:
        """Render messages whose image parts are `{"type": "image", "image": PIL.Image}`.

        Raises:
            RequestError: the messages or one of their images are at fault.
            PluginError: a hook is.
        """
        contents = [m.get("content") for m in messages if isinstance(m, Mapping)]
        parts = [
            part
            for content in contents
            if isinstance(content, list | tuple)
            for part in content
            if isinstance(part, Mapping)
        ]
        self._check_size([*contents, *(part.get("text") for part in parts)])
        images = [part.get("image") for part in parts if part.get("type") == "image"]
        renderer = self.chat
        if chat_template is not None:
            renderer = ChatRenderer(self.ctx, chat_template, self.chat.image_text)
        text, ids = renderer.encode(messages, add_generation_prompt=add_generation_prompt)
        data = {"image": tuple(images)} if images else {}
        return self._expand(text, ids, data, cache_salt, mm_processor_kwargs or {})

    def request(
        self,
        prepared: PreparedPrompt,
        params: SamplingParams,
        request_id: str | None = None,
        *,
        priority: int = 0,
        grammar: bytes | None = None,
    ) -> Request:
        """A `Request` with `max_tokens` filled in. The lower its `priority`, the sooner it runs.

        `grammar` is what the structured output of `params` was compiled to; it is compiled here
        if that hasn't been done.

        Raises:
            RequestError: prompt and answer are longer than the model, an id is out of range, or
                the grammar can't be compiled.
        """
        num_prompt = len(prepared.prompt_token_ids)
        if num_prompt >= self.max_len:
            raise RequestError(
                f"the prompt is too long: {num_prompt} tokens, images included. "
                f"At most {self.max_len - 1} leave room for an answer: shorten it.",
                param="messages",
                code="context_length_exceeded",
            )
        room = self.max_len - num_prompt
        if params.max_tokens is not None and params.max_tokens > room:
            raise RequestError(
                f"max_tokens is too large: {params.max_tokens}. The prompt takes {num_prompt} of "
                f"{self.max_len} tokens: ask for at most {room}.",
                param="max_tokens",
                code="context_length_exceeded",
            )
        for param, ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            for token in ids:
                if token >= self.vocab_size:
                    raise RequestError(
                        f"{param} names a token that the model doesn't have: {token}. "
                        f"Ids go up to {self.vocab_size - 1}.",
                        param=param,
                    )
        if params.structured_outputs is not None and grammar is None:
            grammar = self.grammars.compile(params.structured_outputs)
        return Request(
            request_id=request_id or uuid.uuid4().hex,
            prompt_token_ids=prepared.prompt_token_ids,
            sampling_params=dataclasses.replace(params, max_tokens=params.max_tokens or room),
            items=prepared.items,
            eos_token_ids=self.opened.eos_token_ids,
            cache_salt=prepared.cache_salt,
            priority=priority,
            grammar=grammar,
        )

    def check_ids(self, ids: Sequence[int], param: str = "prompt") -> None:
        """Refuse ids that no prompt of this model has.

        Raises:
            RequestError: one is no integer, or out of range.
        """
        for token in ids:
            if not isinstance(token, int) or isinstance(token, bool):
                raise RequestError(f"{param} token ids must be integers.", param=param)
            if not 0 <= token < self.vocab_size and token != self._placeholder:
                raise RequestError(
                    f"{param} token id is out of range: {token}. "
                    f"Ids go from 0 to {self.vocab_size - 1}.",
                    param=param,
                )

    def dummy_request(self) -> Request:
        """The costliest prompt that one step can hold, by the plugin's dummy data.

        Its items are as many as are allowed and fit. On a CPU it is one item: a step's peak is
        small beside the weights there, and a full step would take most of the startup.

        Raises:
            StartupError: not even one item fits the model's length.
            PluginError: the plugin broke its contract on its own data.
        """
        config = self.opened.config
        limit = self.ctx.limits.get("image", 1)
        if limit == 0:
            return self._dummy(max(1, min(16, self.ctx.max_model_len - 1)), {})
        most = self.plugin.max_tokens(self.ctx, "image")
        if most >= self.ctx.max_model_len:
            raise StartupError(
                f"an image takes up to {most} tokens, but max_model_len is "
                f"{self.ctx.max_model_len}. Raise --max-model-len."
            )
        if pick_device(config).type == "cpu":
            return self._dummy(min(most + 16, self.ctx.max_model_len - 1), {"image": 1})
        seq_len = min(config.max_num_batched_tokens, self.ctx.max_model_len - 1)
        return self._dummy(seq_len, {"image": max(1, min(limit, seq_len // most))})

    def _dummy(self, seq_len: int, counts: Mapping[str, int]) -> Request:
        inputs = self.plugin.dummy_data(self.ctx, seq_len, counts)
        try:
            prepared = self.prepare(inputs)
        except RequestError as error:
            raise self.plugin.blame("dummy_data", f"its own prompt was refused: {error}") from error
        for modality, count in counts.items():
            found = sum(item.modality == modality for item in prepared.items)
            if found != count:
                what = f"{count} {modality}{'s' * (count != 1)}"
                raise self.plugin.blame("dummy_data", f"expected {what}, got {found}")
        num_tokens, most = len(prepared.prompt_token_ids), self.ctx.max_model_len
        if not seq_len <= num_tokens <= most:
            raise self.plugin.blame(
                "dummy_data", f"expected {seq_len} to {most} tokens, got {num_tokens}"
            )
        params = SamplingParams(max_tokens=1, temperature=0.0)
        return Request("profile", prepared.prompt_token_ids, params, prepared.items)

    def _check_size(self, texts: Sequence[Any]) -> None:
        num_bytes = sum(
            len(t.encode("utf-8", "surrogatepass")) for t in texts if isinstance(t, str)
        )
        if num_bytes > self.max_text:
            raise RequestError(
                f"the text is too long: {num_bytes} bytes. Send at most {self.max_text}, and no "
                f"more tokens than {self.max_len - 1}.",
                param="messages",
                code="context_length_exceeded",
            )

    def _tokenize(self, prompt: Any) -> tuple[int, ...]:
        if not isinstance(prompt, str):
            raise RequestError(
                f"the prompt is not a text: {type(prompt).__name__}. Give a str.", param="prompt"
            )
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                "the prompt holds half of a surrogate pair. Send valid Unicode.", param="prompt"
            ) from error
        return tuple(self.ctx.tokenizer(prompt)["input_ids"])

    def _expand(
        self,
        prompt: str | None,
        ids: tuple[int, ...],
        given: Mapping[str, Sequence[Any]],
        cache_salt: str,
        options: Mapping[str, Any],
    ) -> PreparedPrompt:
        if not ids:
            raise RequestError("the prompt is empty. Send at least one token.", param="prompt")
        self.check_ids(ids)  # of texts too: a tokenizer may have more ids than the model
        data: dict[str, tuple[Any, ...]] = {
            modality: tuple(items) for modality, items in given.items() if items
        }
        if not data and self._placeholder not in ids:
            return PreparedPrompt(prompt, ids, cache_salt=cache_salt)
        mapped: dict[str, tuple[Any, ...]] = {}
        keys: dict[str, list[str]] = {}
        for modality, items in data.items():
            images = data[modality] = self._check_items(modality, items)
            mapper = self.plugin.mapper_key(self.ctx, modality)
            if options:
                self._check_options(modality, options)
                mapper += json.dumps(options, sort_keys=True)
            how = (mapper, self.plugin.label, str(self.ctx.checkpoint), cache_salt)
            keys[modality] = [content_key(modality, image, *how) for image in images]
            mapped[modality] = tuple(
                self.processed.get(key, functools.partial(self._map, modality, image, options))
                for key, image in zip(keys[modality], images, strict=True)
            )
        inputs = PromptInputs(
            prompt=prompt, prompt_token_ids=ids, multi_modal_data=data, mapped=mapped
        )
        result = self.plugin.process(self.ctx, inputs)
        assert result.prompt_token_ids is not None  # Plugin.process has checked it
        placed = tuple(
            Item(r, keys[r.modality][r.item], mapped[r.modality][r.item])
            for r in sorted(result.placeholders, key=lambda r: r.offset)
        )
        return PreparedPrompt(prompt, tuple(result.prompt_token_ids), placed, cache_salt)

    def _map(
        self, modality: str, image: Image.Image, options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        return self.plugin.map_item(self.ctx, modality, image, options)

    def _check_options(self, modality: str, options: Mapping[str, Any]) -> None:
        known = self.plugin.option_names(self.ctx, modality)
        if known is not None and not options.keys() <= known:
            raise RequestError(
                f"mm_processor_kwargs names an option that this model's {modality} mapper doesn't "
                f"have. It has {', '.join(sorted(known)) or 'none'}.",
                param="mm_processor_kwargs",
            )

    def _check_items(self, modality: str, items: Sequence[Any]) -> tuple[Image.Image, ...]:
        """The items as RGB."""
        limit = self.ctx.limits.get(modality)
        if limit is None:
            raise RequestError(
                f"modality is not known: {modality}. "
                f"This model takes {', '.join(self.ctx.limits)}.",
                param="multi_modal_data",
            )
        if len(items) > limit:
            raise RequestError(
                f"too many {modality}s: {len(items)}. At most {limit} are allowed "
                "(--limit-mm-per-prompt).",
                param="messages",
            )
        for item in items:
            if not isinstance(item, Image.Image):
                raise RequestError(
                    f"{modality} is not a PIL image: {type(item).__name__}. "
                    "Open it with PIL.Image.open.",
                    param="multi_modal_data",
                )
        try:
            return tuple(to_rgb(item) for item in items)
        except (OSError, ValueError, SyntaxError) as error:  # PIL reads a file's pixels only now
            raise RequestError(
                f"{modality} can't be decoded: {type(error).__name__}. Give a whole picture.",
                param="multi_modal_data",
            ) from error
