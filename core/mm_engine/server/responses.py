"""The bodies that clients get, as OpenAI spells them, with vLLM's `stop_reason`.

Answers are plain dicts: a stream makes thousands a second, and what we say ourselves needs no
validation. Keys that are `NotRequired` are left out where there is nothing to say.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from pydantic import BaseModel
from typing_extensions import TypedDict  # pydantic reads no others before 3.12


class PromptTokensDetails(TypedDict):
    """What is known of the prompt's tokens."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens that a request took; placeholders of images count as expanded."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class TopLogprob(TypedDict):
    """One of the likeliest tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The chosen token at a place, and the likeliest ones there."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of a chat completion's tokens."""

    content: list[TokenLogprob]


class CompletionLogprobs(TypedDict):
    """Log-probabilities of a completion's tokens; `text_offset` is in characters."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class ToolCallFunction(TypedDict):
    """The function that is called, or what is new of its arguments: JSON, as text."""

    name: NotRequired[str]
    arguments: str


class MessageToolCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: ToolCallFunction


class ToolCallDelta(TypedDict):
    """What is new of a call; `index` says of which. The first has its id and name."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: ToolCallFunction


class ChatMessage(TypedDict):
    """The assistant's turn. Without text, because it calls tools, its content is null."""

    role: Literal["assistant"]
    content: str | None
    tool_calls: NotRequired[list[MessageToolCall]]


class ChatChoice(TypedDict):
    """One of the n answers."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChatCompletion(TypedDict):
    """The answer to `POST /v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatDelta(TypedDict):
    """What is new of the assistant's turn."""

    role: NotRequired[Literal["assistant"]]
    content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallDelta]]


class ChatChunkChoice(TypedDict):
    """What is new of one of the n answers."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: NotRequired[int | str | None]


class ChatCompletionChunk(TypedDict):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: NotRequired[Usage | None]


class CompletionChoice(TypedDict):
    """One completion, or what is new of it; prompts × n of them, those of a prompt together."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class Completion(TypedDict):
    """The answer to `POST /v1/completions`, or one event of it."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: NotRequired[Usage | None]


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
