"""The engine without a server: prompts in, answers out, in the caller's process."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypedDict

from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mm_engine.config import EngineConfig, speculation_options
from mm_engine.engine.build import build_engine
from mm_engine.errors import PluginError, RequestError
from mm_engine.inputs.media import ImageSource, MediaLimits, load_images
from mm_engine.inputs.pipeline import InputPipeline, PreparedPrompt
from mm_engine.outputs import ErrorInfo, RequestOutput
from mm_engine.plugins.discovery import default_model
from mm_engine.request import PromptInputs
from mm_engine.sampling_params import SamplingParams
from mm_engine.worker.loader import open_model


class Prompt(TypedDict, total=False):
    """A prompt as `LLM.generate` takes it: text or ids, and the items that go with it."""

    prompt: str
    prompt_token_ids: Sequence[int]
    multi_modal_data: Mapping[str, Any]  # {"image": a PIL image, or a list of them}
    cache_salt: str  # no cache shares anything with a prompt of another salt


Message = Mapping[str, Any]


class LLM:
    """A model, ready to answer.

    `LLM(model, **options)` takes the fields of `EngineConfig` as keywords (`dtype`,
    `max_model_len`, `max_num_seqs`, `max_num_batched_tokens`, `block_size`, `kv_cache_memory`, …).
    Without a model it loads the demo that an installed plugin bundles. `speculative_config` is
    vLLM's: `{"method": "ngram", "num_speculative_tokens": 5}`.

    Raises:
        StartupError: no such checkpoint, no plugin for it, options that contradict it.
        PluginError: the plugin broke its contract on its own dummy data.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        chat_template: str | None = None,
        speculative_config: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> None:
        if speculative_config is not None:
            options |= speculation_options(speculative_config, beside=options)
        self.config = EngineConfig(model=str(model or default_model()), **options)
        opened = open_model(self.config)
        self.pipeline = InputPipeline(opened, chat_template=chat_template)
        self.engine = build_engine(opened, self.config, self.pipeline.dummy_request())
        self.pipeline.limit_length(self.engine.kv_cache.max_tokens)
        self._num_requests = 0

    def generate(
        self,
        prompts: str | Prompt | Sequence[str | Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        """Complete `prompts`; the answers come in their order.

        `sampling_params` is one for all or one for each; `priority` one number for each: lower
        ones run first. A progress bar shows on a terminal unless `use_tqdm` is False. A request
        that fails on its way has `error` set, as has one on which a hook of the plugin fails.

        Raises:
            RequestError: a prompt is at fault; none has been run then.
        """
        single = isinstance(prompts, str | Mapping)
        many: Any = [prompts] if single else list(prompts)
        prepared = [
            _or_error(self.pipeline.prepare, _inputs(prompt), cache_salt=_salt(prompt))
            for prompt in many
        ]
        return self._run(prepared, sampling_params, use_tqdm, priority)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        cache_salt: str = "",
    ) -> list[RequestOutput]:
        """Answer one conversation or several, in OpenAI's form.

        Image parts are `{"type": "image_url", "image_url": {"url": "data:…"}}`, or
        `{"type": "image", "image": PIL.Image}`. No cache shares anything with conversations of
        another `cache_salt`.

        Raises:
            RequestError: a conversation is at fault; none has been run then.
        """
        several = isinstance(messages, list | tuple) and all(
            isinstance(conversation, list | tuple) for conversation in messages
        )
        conversations: Any = messages if messages and several else [messages]
        if not all(isinstance(conversation, list | tuple) for conversation in conversations):
            raise RequestError(
                "messages must be a list of messages, or several such lists.", param="messages"
            )
        prepared = [
            _or_error(
                self.pipeline.prepare_chat,
                self._with_images(conversation),
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                cache_salt=_checked(cache_salt),
            )
            for conversation in conversations
        ]
        return self._run(prepared, sampling_params, use_tqdm)

    def _run(
        self,
        prepared: Sequence[PreparedPrompt | PluginError],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
        priority: Sequence[int] | None = None,
    ) -> list[RequestOutput]:
        if sampling_params is None:
            sampling_params = SamplingParams()
        if isinstance(sampling_params, SamplingParams):
            sampling_params = [sampling_params] * len(prepared)
        if len(sampling_params) != len(prepared):
            raise RequestError(
                f"sampling_params don't match the prompts: {len(sampling_params)} for "
                f"{len(prepared)}. Give one, or one for each prompt.",
                param="sampling_params",
            )
        priorities = _priorities(priority, len(prepared))
        results: dict[str, RequestOutput] = {}
        requests = []
        for prompt, params, rank in zip(prepared, sampling_params, priorities, strict=True):
            self._num_requests += 1
            if isinstance(prompt, PluginError):
                error = ErrorInfo("PluginError", str(prompt))
                request_id = str(self._num_requests)
                results[request_id] = RequestOutput(request_id, finished=True, error=error)
                continue
            request = self.pipeline.request(prompt, params, str(self._num_requests), priority=rank)
            requests.append(request)
            results[request.request_id] = RequestOutput(
                request.request_id,
                prompt=prompt.prompt,
                prompt_token_ids=list(request.prompt_token_ids),
            )
        try:
            for request in requests:
                self.engine.add(request)
            self._drain(results, use_tqdm and self.config.progress)
        except BaseException:
            # Ctrl-C, or a request that the engine refuses: leave nothing running behind.
            for request in requests:
                self.engine.abort(request.request_id, notify=False)
            while self.engine.has_work:
                self.engine.step()  # what has ended gives its blocks back when a step is planned
            raise
        return list(results.values())

    def _drain(self, results: dict[str, RequestOutput], progress: bool) -> None:
        with Progress(
            TextColumn("{task.description}"),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}"),
            console=Console(stderr=True),
            transient=True,
            disable=not progress,
        ) as bar:
            num_failed = sum(output.finished for output in results.values())  # before they ran
            task = bar.add_task("Answering", total=len(results), completed=num_failed, rate="")
            num_tokens = 0
            while self.engine.has_work:
                for output in self.engine.step():
                    results[output.request_id].extend(output)
                    num_tokens += sum(len(new.token_ids) for new in output.outputs)
                    if output.finished:
                        bar.advance(task)
                elapsed = bar.tasks[0].elapsed or 0.0
                if elapsed:
                    bar.update(task, rate=f"{num_tokens / elapsed:.0f} tokens/s")

    def _with_images(self, messages: Sequence[Message]) -> list[Message]:
        """The messages with every image part decoded."""
        sources = []
        for i, message in enumerate(messages):
            for j, part in enumerate(_parts(message)):
                if isinstance(part, Mapping) and part.get("type") == "image_url":
                    param = f"messages.{i}.content.{j}.image_url"
                    url = part.get("image_url")
                    url = url.get("url") if isinstance(url, Mapping) else url
                    if not isinstance(url, str):
                        raise RequestError("image_url must hold a url.", param=param)
                    sources.append(ImageSource(url, param))
        limits = MediaLimits(max_images=self.pipeline.ctx.limits.get("image", 0))
        images = iter(load_images(sources, limits))
        decoded: list[Message] = []
        for message in messages:
            content = _parts(message)
            if content:
                content = [
                    {"type": "image", "image": next(images)}
                    if isinstance(part, Mapping) and part.get("type") == "image_url"
                    else part
                    for part in content
                ]
                message = {**message, "content": content}
            decoded.append(message)
        return decoded


def _parts(message: Any) -> Sequence[Any]:
    """The content parts of a message; what is no message is refused when it is rendered."""
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, list | tuple) else ()


def _or_error(
    prepare: Callable[..., PreparedPrompt], *arguments: Any, **options: Any
) -> PreparedPrompt | PluginError:
    """The prepared prompt, or the error of a plugin's hook: it costs this one request."""
    try:
        return prepare(*arguments, **options)
    except PluginError as error:
        return error


def _salt(prompt: Any) -> str:
    """The `cache_salt` of one prompt of `LLM.generate`, empty if it has none."""
    return _checked(prompt.get("cache_salt") or "" if isinstance(prompt, Mapping) else "")


def _checked(salt: Any) -> str:
    if not isinstance(salt, str):
        raise RequestError(
            f"cache_salt is not a text: {type(salt).__name__}. Give a str.", param="cache_salt"
        )
    return salt


def _priorities(priority: Any, num_prompts: int) -> Sequence[int]:
    """A priority for each prompt, 0 for all if none is given."""
    if priority is None:
        return [0] * num_prompts
    if not isinstance(priority, Sequence) or any(type(number) is not int for number in priority):
        raise RequestError("priority must hold integers, one for each prompt.", param="priority")
    if len(priority) != num_prompts:
        raise RequestError(
            f"priority doesn't match the prompts: {len(priority)} for {num_prompts}. "
            "Give one for each prompt.",
            param="priority",
        )
    return priority


def _inputs(prompt: Any) -> PromptInputs:
    """One prompt of `LLM.generate`; what its parts must be is the pipeline's affair."""
    if isinstance(prompt, str):
        return PromptInputs(prompt=prompt)
    given = prompt.get("multi_modal_data") or {} if isinstance(prompt, Mapping) else None
    if not isinstance(given, Mapping):
        raise RequestError(
            "a prompt must be a str, or a dict with prompt or prompt_token_ids, and with "
            f"multi_modal_data as a dict: got {type(prompt).__name__}.",
            param="prompt",
        )
    ids = prompt.get("prompt_token_ids")
    if ids is not None and not isinstance(ids, Sequence):
        ids = ids.tolist() if hasattr(ids, "tolist") else ids  # an array, a tensor
        ids = ids if isinstance(ids, Sequence) else [ids]  # 0-d arrays give a number
    data = {
        modality: tuple(items) if isinstance(items, list | tuple) else (items,)
        for modality, items in given.items()
        if items is not None
    }
    return PromptInputs(
        prompt=None if ids is not None else prompt.get("prompt"),
        prompt_token_ids=None if ids is None else tuple(ids),
        multi_modal_data=data,
    )
