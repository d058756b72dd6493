"""Tools: what a client offers, and how a model is told of them.

Few vision-language models have a chat template that knows tools, so none is relied on. The model
is told in the system message, and writes calls in the form that many text backbones were taught:

    <tool_call>
    {"name": "weather", "arguments": {"city": "Paris"}}
    </tool_call>

A grammar holds it to that form, and to each tool's parameters.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field

from mm_engine.errors import RequestError
from mm_engine.sampling_params import MAX_GRAMMAR_LENGTH, StructuredOutputsParams
from mm_engine.server.shape import Items, Shape
from mm_engine.worker.json_schema import check_schema

MAX_TOOLS = 128
CALL_OPENS, CALL_CLOSES = "<tool_call>", "</tool_call>"
#: Between the opening and the name, the name and the arguments, the arguments and the closing.
BEFORE_NAME, BEFORE_ARGUMENTS, AFTER_ARGUMENTS = '\n{"name": "', '", "arguments": ', "}\n"
RESULT_OPENS, RESULT_CLOSES = "<tool_response>", "</tool_response>"

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")]


class Function(Shape):
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Shape):
    """A tool: OpenAI's only kind here is a function."""

    type: Literal["function"]
    function: Function


class NamedFunction(Shape):
    """The name of a function."""

    name: str


class NamedTool(Shape):
    """A tool that the model has to call."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunction(Shape):
    """A call as the model wrote it; `arguments` is JSON, as text."""

    name: Name
    arguments: str


class ToolCall(Shape):
    """A call of an earlier turn."""

    id: str
    type: Literal["function"]
    function: CalledFunction


Tools = Annotated[Items[Tool], Field(max_length=MAX_TOOLS)]
ToolChoice = Literal["none", "auto", "required"] | NamedTool


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools an answer may call, or must."""

    functions: tuple[Function, ...]
    required: bool = False  # the answer is calls and nothing else
    several: bool = True  # more than one call may be in an answer

    @classmethod
    def of(cls, tools: Sequence[Tool] | None, choice: Any, several: bool | None) -> ToolUse | None:
        """What the fields of a request ask for; None if no tool may be called.

        Raises:
            RequestError: the choice needs tools, names none of them, or two have one name.
        """
        functions = tuple(tool.function for tool in tools or ())
        names = [function.name for function in functions]
        if len(set(names)) < len(names):
            raise RequestError("two tools have the same name. Rename one.", param="tools")
        if not functions:
            if choice not in (None, "none"):
                raise RequestError(
                    "tool_choice needs tools. Send some, or leave it out.", param="tool_choice"
                )
            return None
        if choice == "none":
            return None
        if isinstance(choice, NamedTool):
            named = tuple(f for f in functions if f.name == choice.function.name)
            if not named:
                raise RequestError(
                    "tool_choice names none of the tools. Name one that was sent.",
                    param="tool_choice",
                )
            return cls(named, required=True, several=False)
        return cls(functions, required=choice == "required", several=several is not False)

    @property
    def structure(self) -> StructuredOutputsParams:
        """What holds an answer to calls of these tools.

        Raises:
            RequestError: the parameters of a strict tool can't be held to.
        """
        tags = [
            {
                "type": "tag",
                "begin": f"{CALL_OPENS}{BEFORE_NAME}{function.name}{BEFORE_ARGUMENTS}",
                "content": {"type": "json_schema", "json_schema": _parameters(function)},
                "end": f"{AFTER_ARGUMENTS}{CALL_CLOSES}",
            }
            for function in self.functions
        ]
        content: dict[str, Any] = {"tags": tags, "stop_after_first": not self.several}
        if self.required:
            content |= {"type": "tags_with_separator", "separator": "\n", "at_least_one": True}
        else:
            content |= {"type": "triggered_tags", "triggers": [CALL_OPENS]}
        tag = {"type": "structural_tag", "format": content}
        return StructuredOutputsParams(structural_tag=json.dumps(tag))

    @property
    def instructions(self) -> str:
        """What the model is told of the tools."""
        signatures = [
            json.dumps(function.model_dump(exclude_none=True, exclude={"strict"}))
            for function in self.functions
        ]
        how = f"{CALL_OPENS}{BEFORE_NAME}NAME{BEFORE_ARGUMENTS}{{…}}{AFTER_ARGUMENTS}{CALL_CLOSES}"
        return "\n".join(
            [
                "These functions are yours to call. Each is described by one line of JSON:",
                "<tools>",
                *signatures,
                "</tools>",
                "Call one by writing its name and its arguments like this:",
                how,
                f"Its result is told to you between {RESULT_OPENS} and {RESULT_CLOSES}.",
            ]
        )


def _parameters(function: Function) -> Any:
    """The schema that arguments are held to: as much of it as can be, unless it is strict."""
    schema = function.parameters
    if schema is None:
        return {"type": "object"}
    try:
        text = json.dumps(schema)
        if len(text) > MAX_GRAMMAR_LENGTH:
            raise RequestError("the parameters of a tool are too long. Shorten them.")
        if schema.get("type") != "object":
            raise RequestError("the parameters of a tool are no object. Say type: object.")
        check_schema(text)
    except RequestError as error:
        if function.strict:
            error.param = "tools"
            raise
        return {"type": "object"}  # as OpenAI has it: arguments are the model's best effort
    return schema
