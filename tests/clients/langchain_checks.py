"""LangChain's `ChatOpenAI`, over chat completions and over responses."""

from __future__ import annotations

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
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel, Field


def model(url: str = URL, **options: Any) -> ChatOpenAI:
    options = {"temperature": 0, "max_tokens": 40, **options}
    return ChatOpenAI(model="demo", base_url=url, api_key="none", max_retries=0, **options)


def asked(*urls: str) -> list[HumanMessage]:
    parts: list[Any] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return [HumanMessage([*parts, {"type": "text", "text": QUESTION}])]


def compared(llm: ChatOpenAI) -> str:
    """Text and image, whole and streamed: the same text, and more tokens with an image."""
    without, whole = llm.invoke(asked()), llm.invoke(asked(PICTURE))
    chunks = list(llm.stream(asked(PICTURE)))
    streamed = chunks[0]
    for chunk in chunks[1:]:
        streamed += chunk
    assert whole.text and streamed.text == whole.text
    assert len(chunks) > 3
    assert whole.usage_metadata and without.usage_metadata and streamed.usage_metadata
    num_tokens = whole.usage_metadata["input_tokens"]
    assert num_tokens > without.usage_metadata["input_tokens"] + MIN_IMAGE_TOKENS
    counts = ("input_tokens", "output_tokens", "total_tokens")
    assert [streamed.usage_metadata[c] for c in counts] == [whole.usage_metadata[c] for c in counts]
    return f"{whole.text!r}, {num_tokens} + {whole.usage_metadata['output_tokens']} tokens"


@check("ChatOpenAI.invoke and .stream: text, image, usage")
def chat() -> str:
    return compared(model(stream_usage=True))


@check("ChatOpenAI(use_responses_api=True).invoke and .stream: text, image, usage")
def responses() -> str:
    return compared(model(use_responses_api=True))


@check("the same with output_version='responses/v1', and the answer sent back")
def responses_conversation() -> str:
    llm = model(use_responses_api=True, output_version="responses/v1")
    first = llm.invoke([SystemMessage("Be brief."), *asked(PICTURE)])
    history = [SystemMessage("Be brief."), *asked(PICTURE), first, HumanMessage("Go on.")]
    second = llm.invoke(history)
    as_text = llm.invoke([*history[:2], AIMessage(first.text), history[3]])
    assert second.text == as_text.text
    return f"{second.text!r}"


@check("ChatOpenAI.batch of three")
def batch() -> str:
    answers = model().batch([asked(), asked(PICTURE), asked(PICTURE, PICTURE)])
    counts = [answer.usage_metadata["input_tokens"] for answer in answers if answer.usage_metadata]
    assert counts == sorted(set(counts)) and len(counts) == 3
    return f"{counts} input tokens"


@check("logprobs=True, top_logprobs=2")
def logprobs() -> str:
    answer = model(logprobs=True, top_logprobs=2).invoke(asked(PICTURE))
    content = answer.response_metadata["logprobs"]["content"]
    assert answer.usage_metadata and len(content) == answer.usage_metadata["output_tokens"]
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    return f"{len(content)} tokens"


@check("finish_reason of an answer that is cut off")
def cut_off() -> str:
    answer = model(max_tokens=2, extra_body={"ignore_eos": True}).invoke(asked())
    assert answer.response_metadata["finish_reason"] == "length"
    return "length"


class Animal(BaseModel):
    """An animal."""

    legs: Annotated[int, Field(ge=0, le=9)]
    kind: Literal["cat", "dog"]


@check("with_structured_output, by json_schema and by function_calling")
def structured() -> str:
    llm = model(max_tokens=200)
    made = [
        llm.with_structured_output(Animal, method=method).invoke(asked(PICTURE))
        for method in ("json_schema", "function_calling")
    ]
    assert all(isinstance(animal, Animal) for animal in made)
    return f"{made[0]!r}"


@check("bind_tools(tool_choice='any'), and the tool's result sent back, streamed and not")
def tools() -> str:
    llm = model(max_tokens=200).bind_tools([Animal], tool_choice="any", parallel_tool_calls=False)
    called = llm.invoke(asked(PICTURE))
    (call,) = called.tool_calls
    Animal(**call["args"])
    chunks = list(llm.stream(asked(PICTURE)))
    streamed = chunks[0]
    for chunk in chunks[1:]:
        streamed += chunk
    assert [c["args"] for c in streamed.tool_calls] == [call["args"]]
    told = ToolMessage("It barks.", tool_call_id=call["id"])
    after = model(max_tokens=20).invoke([*asked(PICTURE), called, told])
    assert after.text
    return f"{call['name']} {call['args']}"


@check("a broken image, chat")
def broken_image() -> str:
    return raised(openai.BadRequestError, lambda: model().invoke(asked(BROKEN_PICTURE)))


@check("a broken image, responses")
def broken_image_in_responses() -> str:
    llm = model(use_responses_api=True)
    return raised(openai.BadRequestError, lambda: llm.invoke(asked(BROKEN_PICTURE)))


@check("no key")
def no_key() -> str:
    return raised(openai.AuthenticationError, lambda: model(KEYED_URL).invoke(asked()))


@check("a second request where one is allowed")
def full_queue() -> str:
    running = model(TIGHT_URL, max_tokens=3000, extra_body={"ignore_eos": True}).stream(asked())
    next(running)
    said = raised(openai.RateLimitError, lambda: model(TIGHT_URL).invoke(asked()))
    running.close()
    return said


@check("OpenAIEmbeddings.embed_query")
def embeddings() -> str:
    embedder = OpenAIEmbeddings(
        base_url=URL, api_key="none", max_retries=0, check_embedding_ctx_length=False
    )
    return raised(openai.NotFoundError, lambda: embedder.embed_query("x"))


if __name__ == "__main__":
    main()
