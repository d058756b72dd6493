"""The bodies that clients get, as OpenAI spells them, with vLLM's `stop_reason`.

Fields without a default are always sent; those with one only where they were set.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class PromptTokensDetails(BaseModel):
    """What is known of the prompt's tokens."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens that a request took; placeholders of images count as expanded."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = None


class TopLogprob(BaseModel):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The chosen token at a place, and the likeliest ones there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat completion's tokens."""

    content: list[TokenLogprob]


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion's tokens; `text_offset` is in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ToolCallFunction(BaseModel):
    """The function that is called, or what is new of its arguments: JSON, as text."""

    name: str | None = None
    arguments: str


class MessageToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: ToolCallFunction


class ToolCallDelta(BaseModel):
    """What is new of a call; `index` says of which. The first has its id and name."""

    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: ToolCallFunction


class ChatMessage(BaseModel):
    """The assistant's turn. Without text, because it calls tools, its content is null."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: list[MessageToolCall] | None = None


class ChatChoice(BaseModel):
    """One of the n answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChatCompletion(BaseModel):
    """The answer to `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(BaseModel):
    """What is new of the assistant's turn."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """What is new of one of the n answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionChoice(BaseModel):
    """One completion, or what is new of it; prompts × n of them, those of a prompt together."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class Completion(BaseModel):
    """The answer to `POST /v1/completions`, or one event of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A name under which the model is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int


class ModelList(BaseModel):
    """The answer to `GET /v1/models`."""

    object: Literal["list"]
    data: list[ModelCard]


class PluginCard(BaseModel):
    """An installed plugin and one architecture that it claims. The served one tells more."""

    distribution: str
    version: str
    architecture: str
    module: str
    served: bool
    hooks: list[str] | None = None  # that it implements; of the served one only: it is loaded
    max_tokens: dict[str, int] | None = None  # of one item, by modality


class PluginList(BaseModel):
    """The answer to `GET /v1/plugins`."""

    object: Literal["list"]
    contract: str  # the version of mm-engine's hooks, as `0.1`
    data: list[PluginCard]


class Version(BaseModel):
    """The answer to `GET /version`."""

    version: str


class Health(BaseModel):
    """The answer to `GET /health` while the engine lives."""

    status: Literal["ok"]


class ErrorDetail(BaseModel):
    """What went wrong, as OpenAI spells it."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error."""

    error: ErrorDetail
