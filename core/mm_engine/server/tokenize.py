"""`POST /tokenize` and `POST /detokenize`, as vLLM spells them. They don't ask the engine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Annotated, ClassVar

from fastapi import Response
from pydantic import BaseModel, Field
from starlette.types import Receive, Scope, Send

from mm_engine.errors import RequestError
from mm_engine.server.chat import with_prepared
from mm_engine.server.exchange import CLIENT_GONE, parsed, read_body, send_json, unless_gone
from mm_engine.server.protocol import (
    MAX_MESSAGES,
    ChatRequest,
    Message,
    TextPart,
    TokenId,
)
from mm_engine.server.service import Service, Slots
from mm_engine.server.shape import Items, NotOffered, Shape

MAX_TOKENS = 2**19  # ids of one body


class TokenizeRequest(Shape):
    """The body of `POST /tokenize`: a prompt as completions take it, or a chat's messages."""

    not_offered: ClassVar[NotOffered] = {
        "chat_template": (None,),
        "chat_template_kwargs": (None, {}),
        "continue_final_message": (None, False),
        "mm_processor_kwargs": (None, {}),
        "tools": (None, []),
    }

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)] | None = None
    add_special_tokens: bool | None = None  # to a prompt; in a chat the template has them
    add_generation_prompt: bool | None = None  # to messages
    return_token_strs: bool | None = None

    def check(self, max_text: int) -> None:
        """Refuse a body that asks for both kinds or neither, or for too much at once.

        Raises:
            RequestError: it does.
        """
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("give either a prompt or messages.", param="prompt")
        if self.messages is not None and self.add_special_tokens is not None:
            raise RequestError(
                "add_special_tokens goes with a prompt. Leave it out: the chat template has them.",
                param="add_special_tokens",
            )
        if self.prompt is not None and self.add_generation_prompt is not None:
            raise RequestError(
                "add_generation_prompt goes with messages. Leave it out.",
                param="add_generation_prompt",
            )
        num_bytes = _size(self.prompt or "") + sum(map(_size_of, self.messages or ()))
        if num_bytes > max_text:
            raise RequestError(
                f"the text is too long: {num_bytes} bytes. Send at most {max_text} at once.",
                param="prompt" if self.messages is None else "messages",
            )


class Tokens(BaseModel):
    """The answer to `POST /tokenize`; an image counts as its expanded placeholders."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Shape):
    """The body of `POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[Items[TokenId], Field(max_length=MAX_TOKENS)]


class Detokenized(BaseModel):
    """The answer to `POST /detokenize`; special tokens are spelled out."""

    prompt: str


async def tokenize(service: Service, body: bytes) -> Tokens:
    """The ids of a prompt or of messages.

    Raises:
        RequestError: the body or one of its images is at fault.
        PluginError: a hook is.
    """
    asked = await parsed(service, TokenizeRequest, body)
    service.check_model(asked.model)
    tokenizer = service.pipeline.ctx.tokenizer
    asked.check(service.pipeline.max_text)

    def told(ids: list[int]) -> Tokens:
        strings = None
        if asked.return_token_strs:  # a placeholder's id may be none of the tokenizer's
            strings = [token or "" for token in tokenizer.convert_ids_to_tokens(ids)]
        max_len = service.pipeline.max_len
        return Tokens(count=len(ids), max_model_len=max_len, tokens=ids, token_strs=strings)

    if asked.messages is None:
        special = asked.add_special_tokens is not False
        return await service.in_thread(
            lambda: told(tokenizer(asked.prompt, add_special_tokens=special)["input_ids"])
        )
    chat = ChatRequest.model_construct(
        messages=asked.messages, add_generation_prompt=asked.add_generation_prompt
    )
    return await with_prepared(
        service, chat, lambda prepared: told(list(prepared.prompt_token_ids))
    )


async def detokenize(service: Service, body: bytes) -> Detokenized:
    """The text of some ids.

    Raises:
        RequestError: the body is at fault, or one of the ids.
    """
    asked = await parsed(service, DetokenizeRequest, body)
    service.check_model(asked.model)
    return await service.in_thread(lambda: _detokenize(service, asked.tokens))


def _detokenize(service: Service, tokens: list[int]) -> Detokenized:
    service.pipeline.check_ids(tokens, "tokens")
    return Detokenized(prompt=str(service.pipeline.ctx.tokenizer.decode(tokens)))


class Errand(Response):
    """A response made in the front process when it is sent. It takes a place in the queue."""

    def __init__(
        self, service: Service, work: Callable[[Service, bytes], Awaitable[BaseModel]]
    ) -> None:
        super().__init__()
        self._service = service
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Admit, read, answer.

        Raises:
            MMEngineError: before the response has started.
        """
        service = self._service
        with service.admit() as slots, service.metrics.in_flight.track_inprogress():
            body = await read_body(receive, service.settings.body_timeout)
            if body is None or not await unless_gone(receive, self._answer(body, send, slots)):
                scope.setdefault("mm_engine.notes", {})["status"] = CLIENT_GONE

    async def _answer(self, body: bytes, send: Send, slots: Slots) -> None:
        answer = await self._work(self._service, body)
        text = await self._service.in_thread(answer.model_dump_json)
        slots.give_back()
        await send_json(send, text.encode())


def _size(text: str) -> int:
    """Bytes of UTF-8: a byte is a token at worst."""
    return len(text.encode())


def _size_of(message: Message) -> int:
    if isinstance(message.content, str):
        return _size(message.content)
    parts = message.content or []
    return sum(_size(part.text) for part in parts if isinstance(part, TextPart))
