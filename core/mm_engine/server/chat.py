"""`POST /v1/chat/completions`: messages in, the assistant's turn out."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from PIL import Image

from mm_engine.inputs.media import ImageSource
from mm_engine.outputs import RequestOutput
from mm_engine.request import Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.server.exchange import Job, parsed
from mm_engine.server.logprobs import chat_logprobs
from mm_engine.server.protocol import ChatRequest, ImagePart, ImageURL, TextPart
from mm_engine.server.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
)
from mm_engine.server.service import Service, Slots
from mm_engine.server.tally import Tally


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
    request = await service.with_images(
        _sources(asked), lambda images: _prepare(service, asked, params, request_id, images)
    )
    return Job([request], ChatReply(service.model_name, request, asked), bool(asked.stream))


def _prepare(
    service: Service,
    asked: ChatRequest,
    params: SamplingParams,
    request_id: str,
    decoded: Sequence[Image.Image],
) -> Request:
    images = iter(decoded)
    messages: list[dict[str, Any]] = []
    for message in asked.messages:
        content: str | list[dict[str, Any]] = []
        if isinstance(message.content, str):
            content = message.content
        else:
            content = [
                {"type": "text", "text": part.text}
                if isinstance(part, TextPart)
                else {"type": "image", "image": next(images)}
                for part in message.content
            ]
        role = "system" if message.role == "developer" else message.role
        messages.append({"role": role, "content": content})
    prepared = service.pipeline.prepare_chat(
        messages,
        add_generation_prompt=asked.add_generation_prompt is not False,
        cache_salt=service.cache_salt(asked.cache_salt),
    )
    return service.pipeline.request(prepared, params, request_id, priority=asked.priority or 0)


def _sources(asked: ChatRequest) -> list[ImageSource]:
    sources = []
    for m, message in enumerate(asked.messages):
        for p, part in enumerate(message.content):
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
            if new.text or logprobs is not None:
                yield self._chunk(
                    ChatChunkChoice(
                        index=new.index,
                        delta=ChatDelta(content=new.text),
                        logprobs=logprobs,
                        finish_reason=None,
                    )
                )
            if new.finish_reason is not None:
                yield self._chunk(
                    ChatChunkChoice(
                        index=new.index,
                        delta=ChatDelta(),
                        logprobs=None,
                        finish_reason=new.finish_reason,
                        stop_reason=new.stop_reason,
                    )
                )

    def closing(self, tally: Tally) -> Iterator[ChatCompletionChunk]:
        """The usage, if it was asked for."""
        if self._include_usage:
            chunk = self._chunk()
            chunk.usage = tally.usage
            yield chunk

    def whole(self, outputs: list[RequestOutput], tally: Tally) -> ChatCompletion:
        """All choices."""
        choices = [
            ChatChoice(
                index=done.index,
                message=ChatMessage(role="assistant", content=done.text),
                logprobs=chat_logprobs(done, self._num_top),
                finish_reason=done.finish_reason,
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

    def _chunk(self, *choices: ChatChunkChoice) -> ChatCompletionChunk:
        chunk = ChatCompletionChunk(
            id=self._id,
            object="chat.completion.chunk",
            created=self._created,
            model=self._model,
            choices=list(choices),
        )
        if self._include_usage:
            chunk.usage = None  # OpenAI's chunks carry a null before the last
        return chunk
