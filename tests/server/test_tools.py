"""Tools: the model is told of them, held to their form, and its calls come back as OpenAI's do.

The demo was never taught to call anything: what it calls, it calls because it must.
"""

from __future__ import annotations

import json
import random
import re
from typing import Any

import pytest
from openai import OpenAI
from pydantic import ValidationError

from mm_engine.errors import RequestError
from mm_engine.server.tool_text import ToolCallReader, joined, with_instructions
from mm_engine.server.tools import Function, NamedTool, Tool, ToolUse
from serving import ServerProcess

CHAT = "/v1/chat/completions"
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Oslo"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
}


def tool(name: str = "weather", parameters: Any = WEATHER, **more: Any) -> dict[str, Any]:
    function = {"name": name, "description": "The weather.", "parameters": parameters}
    return {"type": "function", "function": function | more}


BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the weather?"}],
    "tools": [tool(), tool("stop", {"type": "object", "properties": {}})],
    "max_tokens": 100,
    "temperature": 0.0,
}


def is_weather(arguments: str) -> bool:
    told = json.loads(arguments)
    return (
        told.keys() == {"city", "days"} and told["city"] in ("Paris", "Oslo") and told["days"] <= 9
    )


@pytest.mark.parametrize("seed", range(3))
def test_required_calls_are_made_and_are_well_formed(server: ServerProcess, seed: int) -> None:
    body = BODY | {"tool_choice": "required", "temperature": 1.0, "seed": seed, "n": 2}
    answer = server.http.post(CHAT, json=body | {"parallel_tool_calls": False}).json()
    for choice in answer["choices"]:
        message = choice["message"]
        assert message["content"] is None and choice["finish_reason"] == "tool_calls"
        (call,) = message["tool_calls"]
        assert call["type"] == "function" and call["id"].startswith("call_")
        function = call["function"]
        assert function["name"] in ("weather", "stop")
        if function["name"] == "weather":
            assert is_weather(function["arguments"])
            assert re.fullmatch(r'\{"city": "\w+", "days": -?\d+\}', function["arguments"])
        else:
            assert json.loads(function["arguments"]) == {}


def test_several_calls_have_ids_of_their_own(server: ServerProcess) -> None:
    body = BODY | {"tools": [tool()], "tool_choice": "required", "logit_bias": {"2": -100}}
    (told,) = server.http.post(CHAT, json=body | {"max_tokens": 400}).json()["choices"]
    *calls, _ = told["message"]["tool_calls"]  # it goes on until it is cut off
    assert told["finish_reason"] == "length"
    assert len({call["id"] for call in calls}) == len(calls) > 1
    assert all(is_weather(call["function"]["arguments"]) for call in calls)


def test_a_named_tool_is_called_once(server: ServerProcess) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}
    (told,) = server.http.post(CHAT, json=BODY | {"tool_choice": choice}).json()["choices"]
    assert told["finish_reason"] == "stop"  # as OpenAI says of calls that had to be
    (call,) = told["message"]["tool_calls"]
    assert call["function"]["name"] == "weather" and is_weather(call["function"]["arguments"])


def test_with_auto_the_model_may_answer_in_text(server: ServerProcess) -> None:
    body = BODY | {"max_tokens": 12}
    (told,) = server.http.post(CHAT, json=body).json()["choices"]
    assert told["message"]["content"] and "tool_calls" not in told["message"]
    unheld = server.http.post(CHAT, json=body | {"tool_choice": "none"}).json()
    assert unheld["usage"]["prompt_tokens"] < 40  # nothing of the tools is told then
    with_tools = server.http.post(CHAT, json=body | {"tool_choice": "auto"}).json()
    assert with_tools["usage"]["prompt_tokens"] > unheld["usage"]["prompt_tokens"] + 40
    assert with_tools["choices"] == [told]


def test_a_streamed_call_is_the_whole_one(client: OpenAI) -> None:
    fields: Any = BODY | {"tool_choice": "required", "parallel_tool_calls": False}
    whole = client.chat.completions.create(model="demo", **fields)
    assert whole.choices[0].message.tool_calls is not None
    expected: Any = whole.choices[0].message.tool_calls[0]
    names, arguments, reasons, text = [], "", [], ""
    for chunk in client.chat.completions.create(model="demo", stream=True, **fields):
        (choice,) = chunk.choices
        text += choice.delta.content or ""
        reasons.append(choice.finish_reason)
        for call in choice.delta.tool_calls or ():
            assert call.index == 0 and call.function is not None
            names += [call.function.name] if call.function.name else []
            arguments += call.function.arguments or ""
    assert (names, arguments) == ([expected.function.name], expected.function.arguments)
    assert text == "" and [r for r in reasons if r] == ["tool_calls"]


def test_a_conversation_with_calls_and_results_is_taken(server: ServerProcess) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 1}'},
    }
    turns = [
        *BODY["messages"],
        {"role": "assistant", "content": None, "tool_calls": [call, call | {"id": "call_2"}]},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain <image>"},
        {"role": "tool", "tool_call_id": "call_2", "content": [{"type": "text", "text": "sun"}]},
    ]
    answer = server.http.post(CHAT, json=BODY | {"messages": turns})
    assert answer.status_code == 200, answer.text  # and the <image> is text: none was sent
    asked = server.http.post(CHAT, json=BODY).json()["usage"]["prompt_tokens"]
    assert answer.json()["usage"]["prompt_tokens"] > asked + 20


CALL = {"id": "1", "type": "function", "function": {"name": "a", "arguments": "{}"}}
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {  # changes, param, a part of the message
    "same name": ({"tools": [tool(), tool()]}, "tools", "same name"),
    "no such tool": (
        {"tool_choice": {"type": "function", "function": {"name": "other"}}},
        "tool_choice",
        "names none",
    ),
    "no tools": ({"tools": [], "tool_choice": "auto"}, "tool_choice", "needs tools"),
    "bad choice": ({"tool_choice": "perhaps"}, "tool_choice", ""),
    "bad name": ({"tools": [tool("two words")]}, "tools.0.function.name", ""),
    "other kind": ({"tools": [{"type": "web_search"}]}, "tools.0.type", ""),
    "bad parameters": (
        {"tools": [tool(parameters={"type": "object", "properties": {"a": {"type": "banana"}}})]},
        "tools",
        "banana",
    ),
    "strict": (
        {"tools": [tool(parameters={"type": "object", "not": {}}, strict=True)]},
        "tools",
        "can't be held to",
    ),
    "with a format": (
        {"response_format": {"type": "json_object"}},
        "response_format",
        "combined with tools",
    ),
    "a schema as long as a book": (
        {"tools": [tool(parameters={"type": "object", "x": "y" * 70_000}, strict=True)]},
        "tools",
        "too long",
    ),
    "a result of no call": (
        {"messages": [*BODY["messages"], {"role": "tool", "content": "x"}]},
        "messages.1.tool_call_id",
        "",
    ),
    "calls of a user": (
        {"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]},
        "messages.0.tool_calls",
        "",
    ),
    "too many": ({"tools": [tool(f"t{i}") for i in range(200)]}, "tools", ""),
    "a user without content": ({"messages": [{"role": "user"}]}, "messages.0.content", ""),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_makes_no_sense_is_refused(server: ServerProcess, name: str) -> None:
    changes, param, part = REFUSED[name]
    answer = server.http.post(CHAT, json=BODY | changes)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert part in error["message"]


def test_parameters_that_cant_be_held_to_are_best_effort(server: ServerProcess) -> None:
    loose = tool(parameters={"type": "object", "not": {}})
    body = BODY | {"tools": [loose], "tool_choice": "required", "max_tokens": 30}
    assert server.http.post(CHAT, json=body).status_code == 200


@pytest.mark.parametrize("parameters", [{}, {"type": "boolean"}, {"type": ["object", "null"]}])
def test_arguments_are_an_object_whatever_the_schema_says(
    server: ServerProcess, parameters: Any
) -> None:
    """And of a strict tool, such a schema is refused."""
    body = BODY | {"tools": [tool(parameters=parameters)], "tool_choice": "required"}
    body |= {"max_tokens": 60, "logit_bias": {"2": -100}, "temperature": 1.5, "seed": 3}
    message = server.http.post(CHAT, json=body).json()["choices"][0]["message"]
    assert message["tool_calls"][0]["function"]["arguments"].startswith("{")
    strict = server.http.post(CHAT, json=body | {"tools": [tool(parameters={}, strict=True)]})
    assert strict.status_code == 400 and "no object" in strict.json()["error"]["message"]


def test_a_stop_string_inside_of_a_call_is_no_call(server: ServerProcess) -> None:
    body = BODY | {"tools": [tool()], "tool_choice": "required"}
    (whole,) = server.http.post(CHAT, json=body).json()["choices"]
    assert whole["finish_reason"] == "tool_calls"
    (cut,) = server.http.post(CHAT, json=body | {"stop": ["days"]}).json()["choices"]
    assert (cut["finish_reason"], cut["stop_reason"]) == ("stop", "days")


def pushed(pieces: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls (name, arguments) that a reader finds."""
    reader, text, calls = ToolCallReader(), "", dict[int, tuple[str, str]]()
    for i, piece in enumerate(pieces):
        news = reader.push(piece, last=i == len(pieces) - 1)
        text += news.text
        for call in news.calls:
            name, arguments = calls.get(call["index"], ("", ""))
            calls[call["index"]] = (
                name + call["function"].get("name", ""),
                arguments + call["function"]["arguments"],
            )
    return text, [calls[index] for index in sorted(calls)]


ANSWER = (
    'Let me see <tool <tool_\n<tool_call>\n{"name": "a-b_1", "arguments": '
    '{"x": "}\\"]</tool_call>{", "y": [1, {"z": "\\\\"}]}}\n</tool_call>\n'
    '<tool_call>\n{"name": "c", "arguments": {}}\n</tool_call> done <tool_call'
)
FOUND = (
    "Let me see <tool <tool_ done <tool_call",
    [("a-b_1", '{"x": "}\\"]</tool_call>{", "y": [1, {"z": "\\\\"}]}'), ("c", "{}")],
)


@pytest.mark.parametrize("seed", range(40))
def test_calls_are_found_however_the_answer_is_cut(seed: int) -> None:
    assert pushed([ANSWER]) == FOUND == pushed(list(ANSWER))
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, len(ANSWER)), rng.randint(1, 20)))
    pieces = [ANSWER[a:b] for a, b in zip([0, *cuts], [*cuts, len(ANSWER)], strict=True)]
    assert pushed(pieces) == FOUND


@pytest.mark.parametrize("length", range(len(ANSWER)))
def test_an_answer_that_is_cut_off_tells_what_there_is(length: int) -> None:
    text, calls = pushed([ANSWER[:length]])
    mark = "\n<tool_call>"  # the beginning of one may be all that came of it
    begun = next((n for n in range(len(mark), 0, -1) if text.endswith(mark[:n])), 0)
    assert FOUND[0].startswith((text, text[: len(text) - begun]))
    for (name, arguments), (whole_name, whole) in zip(calls, FOUND[1], strict=False):
        assert name == whole_name and whole.startswith(arguments)


@pytest.mark.parametrize("char", ["\t", "\n", "\0", "\x1f"])
def test_control_characters_in_arguments_are_escaped(char: str) -> None:
    """The grammar of a string with a `maxLength` lets them through; JSON has none."""
    call = f'{{"name": "a", "arguments": {{"x": "b{char}c"}}}}'
    answer = f"<tool_call>\n{call}\n</tool_call>"
    for pieces in ([answer], list(answer)):
        ((name, arguments),) = pushed(pieces)[1]
        assert name == "a" and json.loads(arguments) == {"x": f"b{char}c"}


def test_the_model_is_told_in_the_system_message() -> None:
    use = ToolUse.of([Tool(**tool())], None, None)
    assert use is not None
    user: dict[str, Any] = {"role": "user", "content": "hi"}
    told = with_instructions([user], use)
    assert [m["role"] for m in told] == ["system", "user"]
    assert json.dumps(WEATHER) in told[0]["content"]
    system = {"role": "system", "content": [{"type": "text", "text": "Be kind."}]}
    told = with_instructions([system, user], use)
    assert len(told) == 2
    assert [part["text"] for part in told[0]["content"]] == ["Be kind.", "\n\n", use.instructions]
    assert joined(["a", "", "b"], "-") == "a-b"


def test_a_choice_narrows_what_may_be_called() -> None:
    tools = [Tool(**tool()), Tool(**tool("stop"))]
    assert ToolUse.of(tools, "none", None) is None and ToolUse.of(None, None, None) is None
    free = ToolUse.of(tools, "auto", None)
    assert free is not None and (free.required, free.several) == (False, True)
    named = ToolUse.of(tools, NamedTool(type="function", function={"name": "stop"}), None)
    assert named is not None and [f.name for f in named.functions] == ["stop"]
    assert (named.required, named.several) == (True, False)
    with pytest.raises(RequestError):
        ToolUse.of(tools, NamedTool(type="function", function={"name": "x"}), None)
    with pytest.raises(ValidationError):
        Function(name="a" * 65)
