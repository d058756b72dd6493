"""The bodies that clients send, as OpenAI and vLLM spell them.

Types are strict (a string is no number), integers have 64 bits, numbers are finite; ranges are
`SamplingParams`' business. Unknown fields are ignored, as vLLM does; a field that would change the
answer but isn't offered is refused by name, so that nothing is silently not done.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    Field,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic_core import PydanticCustomError, from_json

from mm_engine.errors import RequestError
from mm_engine.sampling_params import MAX_LOGPROBS, SamplingParams, StructuredOutputsParams
from mm_engine.server.errors import request_error_of
from mm_engine.server.shape import Items, NotOffered, Shape, at_most
from mm_engine.server.structure import StructureFields
from mm_engine.server.tools import ToolCall, ToolChoice, Tools, ToolUse

MAX_MESSAGES = 2048
MAX_PARTS = 2048  # content parts of one message
MAX_PROMPTS = 1024  # prompts of one completion request
MAX_SALT = 1024  # characters of a cache_salt
MAX_BIASES = 8192  # entries of a logit_bias
#: Lists, objects and commas of a body. What makes Python objects of it holds up the event loop,
#: wherever it runs; an image is one long string, and a text is limited by its bytes.
MAX_VALUES = 2**19 + 2**12

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIdString = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class ImageURL(Shape):
    """Where an image is: a data URL, or an http, https or file URL where the server takes those.

    `detail` is OpenAI's hint; images are always seen in full.
    """

    url: str
    detail: str | None = None


class TextPart(Shape):
    """A piece of text in a message."""

    type: Literal["text"]
    text: str


class ImagePart(Shape):
    """An image in a message, at the place where it stands."""

    type: Literal["image_url"]
    image_url: ImageURL | str


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
ContentParts = Annotated[Items[ContentPart], Field(max_length=MAX_PARTS)]


class Message(Shape):
    """One turn of a conversation. Only the assistant's may have no content: it calls tools."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: Items[ToolCall] | None = None  # the assistant's
    #: Of the call whose result a tool's turn tells.
    tool_call_id: Annotated[str | None, Field(validate_default=True)] = None
    content: Annotated[str | ContentParts | None, Field(validate_default=True)] = None

    @field_validator("tool_calls", mode="after")
    @classmethod
    def _check_calls(cls, value: Any, info: ValidationInfo) -> Any:
        if value and info.data.get("role") != "assistant":
            raise PydanticCustomError("role", "Only the assistant calls tools")
        return value

    @field_validator("tool_call_id", mode="after")
    @classmethod
    def _check_call(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role") == "tool":
            raise PydanticCustomError("missing", "Field required")
        return value

    @field_validator("content", mode="after")
    @classmethod
    def _check_content(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not (info.data.get("role") == "assistant"):
            raise PydanticCustomError("missing", "Field required")
        return value


class StreamOptions(Shape):
    """What a stream carries besides the answer."""

    include_usage: bool | None = None


class GenerationRequest(StructureFields):
    """What chat and completion requests have in common. Null means the default."""

    not_offered: ClassVar[NotOffered] = {
        "allowed_token_ids": (None, []),
        "bad_words": (None, []),
        "best_of": (None, 1),
        "logits_processors": (None, []),
        "prompt_logprobs": (None, False),
        "truncate_prompt_tokens": (None,),
        "use_beam_search": (None, False),
    }

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Int64 | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: Int64 | None = None
    min_p: Number | None = None
    seed: Int64 | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    logit_bias: Annotated[dict[TokenIdString, Number], at_most(MAX_BIASES)] | None = None
    max_tokens: Int64 | None = None
    min_tokens: Int64 | None = None
    stop: str | Items[str] | None = None
    stop_token_ids: Items[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=MAX_SALT)] | None = None
    priority: Int64 | None = None  # lower goes first; see `Service.check_priority`
    timeout: Annotated[Number, Field(gt=0)] | None = None  # seconds; see `Deadline`

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that counts tokens."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        if self.stream_options is not None and not self.stream:
            raise RequestError(
                "stream_options needs a stream. Set stream to true.", param="stream_options"
            )
        given: dict[str, Any] = {
            name: value for name in _SAMPLING_FIELDS if (value := getattr(self, name)) is not None
        }
        if self.logit_bias is not None:
            given["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return SamplingParams(
            max_tokens=max_tokens, logprobs=logprobs, structured_outputs=self.structure, **given
        )


_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "skip_special_tokens",
)


class ChatRequest(GenerationRequest):
    """The body of `POST /v1/chat/completions`."""

    not_offered: ClassVar[NotOffered] = GenerationRequest.not_offered | {
        "audio": (None,),
        "chat_template": (None,),
        "chat_template_kwargs": (None, {}),
        "continue_final_message": (None, False),
        "documents": (None, []),
        "echo": (None, False),
        "function_call": (None, "none"),
        "functions": (None, []),
        "modalities": (None, ["text"]),
        "prediction": (None,),
        "web_search_options": (None,),
    }

    messages: Annotated[Items[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    mm_processor_kwargs: dict[str, Any] | None = None  # see `check_options`
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None  # of tools: "auto"
    parallel_tool_calls: bool | None = None
    max_completion_tokens: Annotated[Int64, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None

    @cached_property
    def tool_use(self) -> ToolUse | None:
        """Which tools the answer may call.

        Raises:
            RequestError: the fields contradict each other.
        """
        return ToolUse.of(self.tools, self.tool_choice, self.parallel_tool_calls)

    @property
    def structure_field(self) -> str | None:
        """The field that says what the answer must look like; tools do, too.

        Raises:
            RequestError: several are given.
        """
        field = super().structure_field
        if self.tool_use is None:
            return field
        if field is not None:
            raise RequestError(
                f"{field} can't be combined with tools. Leave one of them out.", param=field
            )
        return "tools"

    def _make_structure(self, field: str) -> StructuredOutputsParams:
        use = self.tool_use
        return super()._make_structure(field) if use is None else use.structure

    def sampling_params(self) -> SamplingParams:
        """How tokens are chosen; without a limit, up to the model's length.

        Raises:
            RequestError: a value is out of range.
        """
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError(
                "top_logprobs needs logprobs. Set logprobs to true.", param="top_logprobs"
            )
        return self._sampling_params(
            max_tokens=self.max_completion_tokens or self.max_tokens,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


def _one_message(value: Any, validate: ValidatorFunctionWrapHandler) -> Any:
    try:
        return validate(value)
    except ValidationError:  # a union's own errors list each member's
        raise PydanticCustomError(
            "prompt", "must be a string, token ids from 0, or a list of either"
        ) from None


Prompt = str | list[TokenId]
Prompts = Annotated[
    str | Items[str] | Items[TokenId] | Items[Items[TokenId]], WrapValidator(_one_message)
]


class CompletionRequest(GenerationRequest):
    """The body of `POST /v1/completions`."""

    not_offered: ClassVar[NotOffered] = GenerationRequest.not_offered | {
        "mm_processor_kwargs": (None, {}),
        "suffix": (None, ""),
        "prompt_embeds": (None,),
    }

    prompt: Prompts
    logprobs: Int64 | None = None
    echo: bool | None = None

    def prompts(self) -> list[Prompt]:
        """The prompts, each as text or as token ids.

        Raises:
            RequestError: none, an empty one, or more than 1,024.
        """
        given = self.prompt
        prompts: list[Prompt]
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            prompts = [given]
        else:
            prompts = [part for part in given if not isinstance(part, int)]
        if not prompts or not all(prompts):
            raise RequestError("the prompt is empty. Send text or token ids.", param="prompt")
        if len(prompts) > MAX_PROMPTS:
            raise RequestError(
                f"too many prompts: {len(prompts)}. Send at most {MAX_PROMPTS}.", param="prompt"
            )
        return prompts

    def sampling_params(self) -> SamplingParams:
        """How tokens are chosen; without a limit, 16 of them.

        Raises:
            RequestError: a value is out of range.
        """
        if self.echo and self.logprobs is not None:
            raise RequestError(
                "echo with logprobs is not offered. Leave one of them out.", param="echo"
            )
        max_tokens = 16 if self.max_tokens is None else self.max_tokens
        if self.max_tokens is None and self.min_tokens is not None:
            max_tokens = max(max_tokens, self.min_tokens)
        return self._sampling_params(max_tokens=max_tokens, logprobs=self.logprobs)


RequestT = TypeVar("RequestT", bound=Shape)


def parse(shape: type[RequestT], body: bytes) -> RequestT:
    """Read a body.

    Raises:
        RequestError: no JSON object, too much in it, a field of the wrong type, or one that isn't
            offered.
    """
    num_values = sum(map(body.count, (b",", b"[", b"{")))
    if num_values > MAX_VALUES:
        raise RequestError(
            f"the body holds too many values: {num_values}. Send at most {MAX_VALUES} at once."
        )
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError:
        raise RequestError("the body is not valid JSON. Send a JSON object.") from None
    if not isinstance(data, dict):
        raise RequestError("the body is not a JSON object. Send one.")
    for name, harmless in shape.not_offered.items():
        if name in data and data[name] not in harmless:
            raise RequestError(f"{name} is not offered. Leave it out.", param=name)
    try:
        request = shape.model_validate(data)
    except ValidationError as invalid:
        raise request_error_of(invalid, data) from None
    if isinstance(request, StructureFields):
        request.read_structure()
    return request
