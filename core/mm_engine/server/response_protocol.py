"""The body of `POST /v1/responses`, as OpenAI spells it.

This server keeps no responses: what refers to a stored one, or asks for what would go on without
the caller, is refused by name. The sampling fields that vLLM adds to chat are taken here, too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from mm_engine.errors import RequestError
from mm_engine.sampling_params import MAX_LOGPROBS, SamplingParams, StructuredOutputsParams
from mm_engine.server.protocol import (
    MAX_MESSAGES,
    MAX_PARTS,
    ChatRequest,
    GenerationRequest,
    ImagePart,
    ImageURL,
    Int64,
    Message,
    StreamOptions,
    TextPart,
)
from mm_engine.server.shape import Items, NotOffered, Shape, at_most
from mm_engine.server.structure import Json, JsonObjectFormat, TextFormat

MAX_METADATA = 16  # pairs
LOGPROBS = "message.output_text.logprobs"  # what `include` says to get log-probabilities

MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]
Metadata = Annotated[
    dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA), at_most(MAX_METADATA)
]
Label = Annotated[str, Field(max_length=1024)]  # of the caller's own; it comes back unread


class InputText(Shape):
    """A piece of text in a message."""

    type: Literal["input_text"]
    text: str


class OutputText(Shape):
    """A piece of an earlier answer; its annotations and log-probabilities are passed over."""

    type: Literal["output_text"]
    text: str


class InputImage(Shape):
    """An image in a message, at the place where it stands. Files aren't kept here: no `file_id`."""

    type: Literal["input_image"]
    image_url: str
    detail: str | None = None
    file_id: None = None


InputPart = Annotated[InputText | OutputText | InputImage, Field(discriminator="type")]


class InputMessage(Shape):
    """One turn of a conversation: OpenAI's input message, easy message and output message."""

    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: str | Annotated[Items[InputPart], Field(max_length=MAX_PARTS)]


class SchemaFormat(Shape):
    """JSON that a schema describes. Answers are always held to it, whatever `strict` says."""

    model_config = ConfigDict(serialize_by_alias=True)  # it comes back in the answer

    type: Literal["json_schema"]
    name: str
    description: str | None = None
    schema_: Annotated[Json, Field(alias="schema")]
    strict: bool | None = None


OutputFormat = Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")]


class TextConfig(Shape):
    """How the answer's text is to be."""

    format: OutputFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None


class ResponseStreamOptions(StreamOptions):
    """What a stream carries besides the answer; its last event has the usage in any case."""

    include_obfuscation: bool | None = None


class ResponseRequest(GenerationRequest):
    """The body of `POST /v1/responses`."""

    not_offered: ClassVar[NotOffered] = GenerationRequest.not_offered | {
        "background": (None, False),
        "context_management": (None, []),
        "conversation": (None,),
        "logprobs": (None, False),  # `include` asks for them
        "mm_processor_kwargs": (None, {}),
        "moderation": (None,),
        "n": (None, 1),
        "previous_response_id": (None,),
        "prompt": (None,),
        "reasoning": (
            None,
            {},
            {"effort": None},
            {"effort": "none"},
            {"effort": None, "summary": None},
        ),
        "response_format": (None, {"type": "text"}),  # `text.format` asks for one
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
        "truncation": (None, "disabled"),
    }

    input: str | Annotated[Items[InputMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: Annotated[Int64, Field(ge=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    include: (
        Items[
            Literal[
                "code_interpreter_call.outputs",
                "computer_call_output.output.image_url",
                "file_search_call.results",
                "message.input_image.image_url",
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "web_search_call.action.sources",
                "web_search_call.results",
            ]
        ]
        | None
    ) = None  # all but LOGPROBS tell of what never happens here
    text: TextConfig | None = None
    stream_options: ResponseStreamOptions | None = None
    store: bool | None = None  # nothing is kept; the answer says so
    tool_choice: Literal["none", "auto"] | None = None  # of no tools
    parallel_tool_calls: bool | None = None
    metadata: Metadata | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None

    @property
    def with_logprobs(self) -> bool:
        """Whether the answer carries its tokens' log-probabilities."""
        return LOGPROBS in (self.include or ())

    def sampling_params(self) -> SamplingParams:
        """How tokens are chosen; without a limit, up to the model's length.

        Raises:
            RequestError: a value is out of range, or asks for what isn't offered.
        """
        if self.max_tokens is not None:
            raise RequestError(
                "max_tokens has another name here. Use max_output_tokens.", param="max_tokens"
            )
        if self.top_logprobs and not self.with_logprobs:
            raise RequestError(
                f'top_logprobs needs log-probabilities. Set include to ["{LOGPROBS}"].',
                param="top_logprobs",
            )
        if self.stream_options is not None and self.stream_options.include_obfuscation:
            raise RequestError(
                "stream_options.include_obfuscation is not offered. Leave it out, and encrypt "
                "the connection.",
                param="stream_options.include_obfuscation",
            )
        if self.text is not None and self.text.verbosity not in (None, "medium"):
            raise RequestError(
                "text.verbosity is not offered. Leave it out, and say in instructions how long "
                "the answer should be.",
                param="text.verbosity",
            )
        return self._sampling_params(
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if self.with_logprobs else None,
        )

    @property
    def structure_field(self) -> str | None:
        """The field that says what the answer must look like.

        Raises:
            RequestError: several are given.
        """
        field = super().structure_field
        if self.text is None or isinstance(self.text.format, TextFormat | None):
            return field
        if field is not None:
            raise RequestError(
                f"{field} can't be combined with text.format. Leave one of them out.", param=field
            )
        return "text.format"

    def _make_structure(self, field: str) -> StructuredOutputsParams:
        if field != "text.format" or self.text is None:
            return super()._make_structure(field)
        if not isinstance(self.text.format, SchemaFormat):
            return StructuredOutputsParams(json_object=True)
        return StructuredOutputsParams(json=json.dumps(self.text.format.schema_))

    def chat(self) -> ChatRequest:
        """The same conversation as a chat's: messages and parts keep their order and number.

        Raises:
            RequestError: there is no input.
        """
        if not self.input:
            raise RequestError("the input is empty. Send text or messages.", param="input")
        return ChatRequest.model_construct(
            messages=list(self._messages()), cache_salt=self.cache_salt, priority=self.priority
        )

    def _messages(self) -> Iterator[Message]:
        if self.instructions is not None:
            yield Message(role="system", content=self.instructions)
        if isinstance(self.input, str):
            yield Message(role="user", content=self.input)
            return
        for message in self.input:
            content = message.content
            yield Message.model_construct(
                role=message.role,
                content=content if isinstance(content, str) else list(map(_part, content)),
            )

    def own_error(self, error: RequestError) -> RequestError:
        """An error of the chat that `chat` made, with the fields' names as they are here."""
        param = error.param
        message = str(error)
        if param == "max_tokens":
            param, message = "max_output_tokens", message.replace("max_tokens", "max_output_tokens")
        elif param is not None and param.partition(".")[0] == "messages":
            param = self._own_param(param)
        return RequestError(message, param=param, status=error.status, code=error.code)

    def _own_param(self, param: str) -> str:
        _, *path = param.split(".")
        if not path or not path[0].isdecimal():
            return "input"
        number = int(path[0]) - (self.instructions is not None)
        if number < 0:
            return "instructions"
        return (
            "input" if isinstance(self.input, str) else ".".join(["input", str(number), *path[1:]])
        )


def _part(part: InputText | OutputText | InputImage) -> TextPart | ImagePart:
    if isinstance(part, InputImage):
        url = ImageURL.model_construct(url=part.image_url, detail=part.detail)
        return ImagePart.model_construct(type="image_url", image_url=url)
    return TextPart.model_construct(type="text", text=part.text)
