"""LlamaIndex's `OpenAILike`, and its `OpenAIResponses`, which comes with it."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal

import openai
from harness import (
    BROKEN_PICTURE,
    KEYED_URL,
    MIN_IMAGE_TOKENS,
    PICTURE,
    QUESTION,
    TIGHT_URL,
    URL,
    check,
    main,
    raised,
)
from llama_index.core.llms import ChatMessage, ImageBlock, TextBlock
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai import OpenAIResponses
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, Field


def model(url: str = URL, **options: Any) -> OpenAILike:
    options = {"temperature": 0, "max_tokens": 40, "is_chat_model": True, **options}
    return OpenAILike(
        model="demo", api_base=url, api_key="none", context_window=4096, max_retries=0, **options
    )


def asked(*urls: str) -> list[ChatMessage]:
    images = [
        ImageBlock(image=base64.b64decode(url.partition(",")[2]), image_mimetype="image/png")
        for url in urls
    ]
    return [ChatMessage(role="user", blocks=[*images, TextBlock(text=QUESTION)])]


@check("OpenAILike.chat and .stream_chat: text, ImageBlock, usage")
def chat() -> str:
    without, whole = model().chat(asked()), model().chat(asked(PICTURE))
    chunks = list(model().stream_chat(asked(PICTURE)))
    assert whole.message.content
    assert "".join(chunk.delta or "" for chunk in chunks) == whole.message.content
    assert chunks[-1].message.content == whole.message.content
    usage = whole.raw.usage
    assert usage.prompt_tokens > without.raw.usage.prompt_tokens + MIN_IMAGE_TOKENS
    return f"{whole.message.content!r}, {usage.prompt_tokens} + {usage.completion_tokens} tokens"


@check("OpenAILike.complete and .stream_complete (/v1/completions)")
def complete() -> str:
    llm = model(is_chat_model=False)
    whole = llm.complete("a red").text
    assert whole and list(llm.stream_complete("a red"))[-1].text == whole
    return f"{whole!r}"


@check("OpenAIResponses.chat and .stream_chat (/v1/responses): text, ImageBlock, usage")
def responses() -> str:
    llm = OpenAIResponses(
        model="demo",
        api_base=URL,
        api_key="none",
        context_window=4096,
        max_retries=0,
        max_output_tokens=40,
        temperature=0,
    )
    without, whole = llm.chat(asked()), llm.chat(asked(PICTURE))
    chunks = list(llm.stream_chat(asked(PICTURE)))
    assert whole.message.content
    assert chunks[-1].message.content == whole.message.content
    usage = whole.raw.usage
    assert usage.input_tokens > without.raw.usage.input_tokens + MIN_IMAGE_TOKENS
    return f"{whole.message.content!r}, {usage.input_tokens} + {usage.output_tokens} tokens"


@check("logprobs=True, top_logprobs=2")
def logprobs() -> str:
    answer = model(logprobs=True, top_logprobs=2).chat(asked(PICTURE))
    assert answer.logprobs and len(answer.logprobs) == answer.raw.usage.completion_tokens
    assert all(len(top) == 2 for top in answer.logprobs)
    return f"{len(answer.logprobs)} tokens"


class Animal(BaseModel):
    """An animal."""

    legs: Annotated[int, Field(ge=0, le=9)]
    kind: Literal["cat", "dog"]


@check("as_structured_llm, which calls a function that it has to")
def structured() -> str:
    llm = model(is_function_calling_model=True, max_tokens=200)
    answer = llm.as_structured_llm(Animal).chat(asked(PICTURE))
    assert isinstance(answer.raw, Animal)
    return f"{answer.raw!r}"


@check("predict_and_call with a FunctionTool")
def tools() -> str:
    seen: list[tuple[int, str]] = []

    def show(legs: int, kind: str) -> str:
        """Show an animal."""
        seen.append((legs, kind))
        return f"{kind} on {legs} legs"

    llm = model(is_function_calling_model=True, max_tokens=200)
    tool = FunctionTool.from_defaults(fn=show)
    answer = llm.predict_and_call([tool], chat_history=asked(), tool_choice="required")
    assert len(seen) >= 1
    return f"{answer.response!r}"


@check("a broken image")
def broken_image() -> str:
    return raised(openai.BadRequestError, lambda: model().chat(asked(BROKEN_PICTURE)))


@check("no key")
def no_key() -> str:
    return raised(openai.AuthenticationError, lambda: model(KEYED_URL).chat(asked()))


@check("a second request where one is allowed")
def full_queue() -> str:
    more = {"extra_body": {"ignore_eos": True}}
    running = model(TIGHT_URL, max_tokens=3000, additional_kwargs=more).stream_chat(asked())
    next(running)
    said = raised(openai.RateLimitError, lambda: model(TIGHT_URL).chat(asked()))
    running.close()
    return said


if __name__ == "__main__":
    main()
