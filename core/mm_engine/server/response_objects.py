"""What `POST /v1/responses` answers: the response object and the events of its stream.

As in `responses.py`, these are plain dicts. Fields that can only have one value on a server without
tools, reasoning and storage have that value for a type.
"""

from __future__ import annotations

from typing import Literal, NotRequired

from typing_extensions import TypedDict

from mm_engine.server.response_protocol import OutputFormat
from mm_engine.server.responses import TokenLogprob

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class OutputTextPart(TypedDict):
    """The answer's text; log-probabilities are there if `include` asked for them."""

    type: Literal["output_text"]
    text: str
    annotations: list[str]  # always empty
    logprobs: list[TokenLogprob]


class OutputMessage(TypedDict):
    """The assistant's turn."""

    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputTextPart]


class InputTokensDetails(TypedDict):
    """Where the prompt's tokens came from; what is written to a cache isn't counted."""

    cached_tokens: int
    cache_write_tokens: int


class OutputTokensDetails(TypedDict):
    """What the answer's tokens were for."""

    reasoning_tokens: int


class ResponseUsage(TypedDict):
    """Tokens that a request took; placeholders of images count as expanded."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(TypedDict):
    """Why an answer isn't whole."""

    reason: Literal["max_output_tokens"]


class ResponseError(TypedDict):
    """Why there is no answer: told in a stream only, whose status is out already."""

    code: Literal["server_error", "invalid_prompt"]
    message: str


class Reasoning(TypedDict):
    """How much is thought in advance: nothing."""

    effort: None
    summary: None


class TextConfigEcho(TypedDict):
    """How the text is."""

    format: OutputFormat
    verbosity: Literal["medium"]


class ResponseObject(TypedDict):
    """The answer to `POST /v1/responses`, with what was asked."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: NotRequired[int]
    status: Status
    background: Literal[False]
    error: ResponseError | None
    incomplete_details: IncompleteDetails | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None
    metadata: dict[str, str]
    model: str
    output: list[OutputMessage]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: Reasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False]
    temperature: float
    text: TextConfigEcho
    tool_choice: Literal["auto", "none"]
    tools: list[str]  # always empty
    top_logprobs: int
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None


class Numbered(TypedDict):
    """An event of a stream; numbers count from 0."""

    sequence_number: int


class LifecycleEvent(Numbered):
    """The response as it is when it begins, runs and ends."""

    type: Literal[
        "response.created",
        "response.in_progress",
        "response.completed",
        "response.incomplete",
        "response.failed",
    ]
    response: ResponseObject


class OutputItemEvent(Numbered):
    """The message, empty and whole."""

    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputMessage


class PartEvent(Numbered):
    """What all events inside the message say of their place."""

    item_id: str
    output_index: int
    content_index: int


class ContentPartEvent(PartEvent):
    """The message's text, empty and whole."""

    type: Literal["response.content_part.added", "response.content_part.done"]
    part: OutputTextPart


class TextDeltaEvent(PartEvent):
    """What is new of the text."""

    type: Literal["response.output_text.delta"]
    delta: str
    logprobs: list[TokenLogprob]


class TextDoneEvent(PartEvent):
    """All of the text."""

    type: Literal["response.output_text.done"]
    text: str
    logprobs: list[TokenLogprob]


class ErrorEvent(Numbered):
    """Why a stream ends that never told of its response."""

    type: Literal["error"]
    code: str | None
    message: str
    param: str | None
