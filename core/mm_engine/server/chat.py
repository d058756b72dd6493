"""`POST /v1/chat/completions`: messages in, the assistant's turn out."""

from __future__ import annotations

import functools
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

from mm_engine.errors import PluginError
from mm_engine.inputs.media import ImageSource
from mm_engine.outputs import CompletionOutput, RequestOutput
from mm_engine.request import Request
from mm_engine.server.exchange import Job, parsed
from mm_engine.server.logprobs import chat_logprobs
from mm_engine.server.mapper_options import blame, check_options
from mm_engine.server.protocol import ChatRequest, ImagePart, ImageURL, TextPart
from mm_engine.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
    MessageToolCall,
)
from mm_engine.server.service import Service, Slots
from mm_engine.server.tally import Tally
from mm_engine.server.tool_text import (
    Content,
    News,
    ToolCallReader,
    joined,
    result,
    with_instructions,
    written,
)
from mm_engine.server.tools import NamedTool

_ROLES = {"developer": "system", "tool": "user"}  # as templates know them

if TYPE_CHECKING:
    from mm_engine.inputs.pipeline import PreparedPrompt

T = TypeVar("T")


async def open_chat(service: Service, body: bytes, slots: Slots) -> Job:
    """Validate a body and make it a request for the engine.

    Raises:
        RequestError: it, one of its images or its length is at fault.
        Overloaded: too many images are being fetched.
        PluginError: a hook is.
    """
    asked = await parsed(service, ChatRequest, body)
    service.check_model(asked.model)
    service.check_priority(asked.priority)
    params = asked.sampling_params()
    request_id = f"chatcmpl-{uuid.uuid4().hex}"
    grammar = await service.compile_grammar(asked)
    request = await with_prepared(
        service,
        asked,
        lambda prepared: service.pipeline.request(
            prepared, params, request_id, priority=asked.priority or 0, grammar=grammar
        ),
    )
    reply = ChatReply(service.model_name, request, asked)
    at_fault = functools.partial(blame, asked.mm_processor_kwargs if request.items else None)
    return Job([request], reply, bool(asked.stream), asked.timeout, blame=at_fault)


async def with_prepared(
    service: Service, asked: ChatRequest, work: Callable[[PreparedPrompt], T]
) -> T:
    """Render a conversation, and do blocking work on it. All routes with messages come this way.

    Raises:
        RequestError: the messages or one of their images are at fault.
        PluginError: a hook is.
    """
    check_options(asked.mm_processor_kwargs, service.settings.allowed_mm_processor_kwargs)
    sources = _sources(asked)
    try:
        return await service.with_images(
            sources, lambda images: work(_prepare(service, asked, images))
        )
    except PluginError as error:
        told = blame(asked.mm_processor_kwargs if sources else None, error)
        if told is error:
            raise
        raise told from error


def _prepare(service: Service, asked: ChatRequest, images: Sequence[Image.Image]) -> PreparedPrompt:
    messages = _conversation(asked, iter(images))
    use = asked.tool_use
    if use is not None:
        messages = with_instructions(messages, use)
    return service.pipeline.prepare_chat(
        messages,
        add_generation_prompt=asked.add_generation_prompt is not False,
        cache_salt=service.cache_salt(asked.cache_salt),
        mm_processor_kwargs=asked.mm_processor_kwargs,
    )


def _conversation(asked: ChatRequest, images: Iterator[Any]) -> list[dict[str, Any]]:
    """The messages in the roles that templates know, with their images."""
    messages: list[dict[str, Any]] = []
    for i, message in enumerate(asked.messages):
        content: Content
        if message.content is None or isinstance(message.content, str):
            content = message.content or ""
        else:
            content = [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image", "image": next(images)}
                for part in message.content
            ]
        if message.role == "tool":
            content = result(content)
            if i and asked.messages[i - 1].role == "tool":  # templates want turns to alternate
                messages[-1]["content"] = joined([messages[-1]["content"], content], "\n")
                continue
        elif message.role == "assistant" and message.tool_calls:
            content = joined([content, written(message.tool_calls)], "\n")
        role = _ROLES.get(message.role, message.role)
        messages.append({"role": role, "content": content})
    return messages


def _sources(asked: ChatRequest) -> list[ImageSource]:
    sources = []
    for m, message in enumerate(asked.messages):
        parts = message.content if isinstance(message.content, list) else []
        for p, part in enumerate(parts):
            if isinstance(part, ImagePart):
                image = part.image_url
                url = image.url if isinstance(image, ImageURL) else image
                sources.append(ImageSource(url, f"messages.{m}.content.{p}.image_url"))
    return sources


class ChatReply:
    """Tells an answer in the shapes of OpenAI's chat completions."""

    def __init__(self, model: str, request: Request, asked: ChatRequest) -> None:
        self._model = model
        self._id = request.request_id
        self._created = int(time.time())
        self._num_choices = request.sampling_params.n
        self._num_top = request.sampling_params.logprobs or 0
        self._include_usage = asked.include_usage
        self._tools = asked.tool_use
        self._named = isinstance(asked.tool_choice, NamedTool)
        self._readers = [ToolCallReader() for _ in range(self._num_choices)]

    def opening(self) -> Iterator[ChatCompletionChunk]:
        """The role, for each choice."""
        for index in range(self._num_choices):
            delta = ChatDelta(role="assistant", content="")
            yield self._chunk(
                ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)
            )

    def events(self, prompt: int, output: RequestOutput) -> Iterator[ChatCompletionChunk]:
        """New text of each choice; the reason why it ended in a chunk of its own."""
        for new in output.outputs:
            logprobs = chat_logprobs(new, self._num_top)
            told = self._read(new)
            if told.text or told.calls or logprobs is not None:
                delta = ChatDelta(content=told.text) if told.text or not told.calls else ChatDelta()
                if told.calls:
                    delta["tool_calls"] = told.calls
                yield self._chunk(
                    ChatChunkChoice(
                        index=new.index, delta=delta, logprobs=logprobs, finish_reason=None
                    )
                )
            if new.finish_reason is not None:
                yield self._chunk(
                    ChatChunkChoice(
                        index=new.index,
                        delta=ChatDelta(),
                        logprobs=None,
                        finish_reason=self._finish_reason(new),
                        stop_reason=new.stop_reason,
                    )
                )

    def closing(self, tally: Tally) -> Iterator[ChatCompletionChunk]:
        """The usage, if it was asked for."""
        if self._include_usage:
            chunk = self._chunk()
            chunk["usage"] = tally.usage
            yield chunk

    def whole(self, outputs: list[RequestOutput], tally: Tally) -> ChatCompletion:
        """All choices."""
        choices = [
            ChatChoice(
                index=done.index,
                message=self._message(done),
                logprobs=chat_logprobs(done, self._num_top),
                finish_reason=self._finish_reason(done),
                stop_reason=done.stop_reason,
            )
            for done in outputs[0].outputs
        ]
        return ChatCompletion(
            id=self._id,
            object="chat.completion",
            created=self._created,
            model=self._model,
            choices=choices,
            usage=tally.usage,
        )

    def _read(self, new: CompletionOutput) -> News:
        """What is new of one choice: its text, and calls of tools if any were offered."""
        if self._tools is None:
            return News(new.text)
        return self._readers[new.index].push(new.text, last=new.finish_reason is not None)

    def _message(self, done: CompletionOutput) -> ChatMessage:
        told = self._read(done)
        calls: list[MessageToolCall] = []
        for new in told.calls:
            if "id" in new:
                function = new["function"].copy()
                calls.append(MessageToolCall(id=new["id"], type="function", function=function))
            else:
                calls[-1]["function"]["arguments"] += new["function"]["arguments"]
        if not calls:
            return ChatMessage(role="assistant", content=told.text)
        return ChatMessage(role="assistant", content=told.text or None, tool_calls=calls)

    def _finish_reason(self, new: CompletionOutput) -> str | None:
        """`tool_calls` after calls that the model chose; those it was told to make end in `stop`,
        as OpenAI's do."""
        reader = self._readers[new.index]
        whole = reader.num_calls and not reader.in_call  # a stop string may end it in a call
        if new.finish_reason == "stop" and whole and not self._named:
            return "tool_calls"
        return new.finish_reason

    def _chunk(self, *choices: ChatChunkChoice) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=list(choices),
        )
        if self._include_usage:
            chunk["usage"] = None  # OpenAI's chunks carry a null before the last
        return chunk
