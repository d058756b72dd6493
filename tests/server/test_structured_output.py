"""Structured output over HTTP: every spelling, streamed and not, and what is refused.

The demo was never taught any of it: without a structure it answers nothing of the kind.
"""

from __future__ import annotations

import json
import re
import threading
import time
from typing import Any

import pytest
from openai import OpenAI
from pydantic import BaseModel

from mm_engine import LLM, SamplingParams, StructuredOutputsParams
from serving import ServerProcess

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
SCHEMA = {
    "type": "object",
    "properties": {"size": {"type": "integer", "maximum": 9}, "kind": {"enum": ["cat", "dog"]}},
    "required": ["size", "kind"],
    "additionalProperties": False,
}
REGEX, GRAMMAR = r"[a-f]{3}-\d{2}", 'root ::= "up" | "down"'
NAMED = {"name": "animal", "schema": SCHEMA, "strict": True}
#: Fields of a request, and what the answer then is.
ASKED: dict[str, tuple[dict[str, Any], str]] = {
    "json_schema": ({"response_format": {"type": "json_schema", "json_schema": NAMED}}, "json"),
    "structured_outputs json": ({"structured_outputs": {"json": SCHEMA}}, "json"),
    "json as text": ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, "json"),
    "guided_json": ({"guided_json": SCHEMA}, "json"),
    "structured_outputs regex": ({"structured_outputs": {"regex": REGEX}}, "regex"),
    "guided_regex": ({"guided_regex": REGEX}, "regex"),
    "structured_outputs choice": ({"structured_outputs": {"choice": ["up", "down"]}}, "choice"),
    "guided_choice": ({"guided_choice": ["up", "down"]}, "choice"),
    "structured_outputs grammar": ({"structured_outputs": {"grammar": GRAMMAR}}, "choice"),
    "guided_grammar": ({"guided_grammar": GRAMMAR}, "choice"),
}
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "What is it?"}], "max_tokens": 64},
    COMPLETIONS: {"prompt": "What is it?", "max_tokens": 64},
}


def text_of(choice: dict[str, Any]) -> str:
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def keeps_to(text: str, kind: str) -> bool:
    if kind == "json":
        try:
            told = json.loads(text)
        except ValueError:
            return False
        return (
            isinstance(told, dict)
            and told.keys() == {"size", "kind"}
            and isinstance(told["size"], int)
            and told["size"] <= 9
            and told["kind"] in ("cat", "dog")
        )
    return bool(re.fullmatch(REGEX, text)) if kind == "regex" else text in ("up", "down")


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("asked", ASKED)
def test_answers_keep_to_what_was_asked(server: ServerProcess, route: str, asked: str) -> None:
    fields, kind = ASKED[asked]
    body = BODIES[route] | {"n": 3, "temperature": 1.0, "seed": 5}
    answer = server.http.post(route, json=body | fields).json()
    assert [choice["finish_reason"] for choice in answer["choices"]] == ["stop"] * 3
    assert all(keeps_to(text_of(choice), kind) for choice in answer["choices"])
    free = server.http.post(route, json=body).json()
    assert not any(keeps_to(text_of(choice), kind) for choice in free["choices"])


def test_a_json_object_is_one_if_it_ends(server: ServerProcess) -> None:
    body = BODIES[CHAT] | {"response_format": {"type": "json_object"}, "n": 8, "temperature": 1.5}
    answer = server.http.post(CHAT, json=body | {"seed": 1}).json()
    ended = [c for c in answer["choices"] if c["finish_reason"] == "stop"]
    assert ended
    assert all(isinstance(json.loads(text_of(c)), dict) for c in ended)
    assert all(text_of(c).startswith("{") for c in answer["choices"])


def test_pieces_of_a_stream_are_the_whole(client: OpenAI) -> None:
    fields = {"max_tokens": 64, "temperature": 0.0, "extra_body": ASKED["guided_json"][0]}
    messages: Any = BODIES[CHAT]["messages"]
    whole = client.chat.completions.create(model="demo", messages=messages, **fields)
    stream = client.chat.completions.create(model="demo", messages=messages, stream=True, **fields)
    pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert keeps_to("".join(pieces), "json")


def test_the_clients_parse_helper_gives_the_object(client: OpenAI) -> None:
    class Choice(BaseModel):
        legs: int
        wild: bool

    parsed = client.chat.completions.parse(
        model="demo",
        messages=[{"role": "user", "content": "What is it?"}],
        response_format=Choice,
        max_tokens=64,
    )
    assert isinstance(parsed.choices[0].message.parsed, Choice)


def test_a_response_keeps_to_its_format(client: OpenAI) -> None:
    form: Any = {"type": "json_schema", "name": "animal", "schema": SCHEMA, "strict": True}
    made = client.responses.create(model="demo", input="What is it?", text={"format": form})
    assert keeps_to(made.output_text, "json")
    told: Any = made.text and made.text.format
    assert told.model_dump(by_alias=True)["schema"] == SCHEMA
    free = client.responses.create(model="demo", input="What is it?", max_output_tokens=32)
    assert not keeps_to(free.output_text, "json")


def test_the_server_answers_as_the_library_does(server: ServerProcess) -> None:
    body = BODIES[COMPLETIONS] | {"temperature": 0.0, "structured_outputs": {"json": SCHEMA}}
    text = server.http.post(COMPLETIONS, json=body).json()["choices"][0]["text"]
    llm = LLM(dtype="float32", kv_cache_memory=2**22, progress=False)
    params = SamplingParams(
        temperature=0.0, max_tokens=64, structured_outputs=StructuredOutputsParams(json=SCHEMA)
    )
    (output,) = llm.generate(body["prompt"], params, use_tqdm=False)
    assert output.outputs[0].text == text


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {  # fields, param, a part of the message
    "bad regex": ({"guided_regex": "[a"}, "guided_regex", "Unclosed"),
    "bad grammar": ({"guided_grammar": "root ::= x"}, "guided_grammar", "can't be compiled"),
    "bad schema": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 3}}},
        "response_format.json_schema.schema",
        "",
    ),
    "schema kept in part": ({"guided_json": {"not": {}}}, "guided_json", "not can't be held to"),
    "two": ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice", "combined"),
    "with a format": (
        {"response_format": {"type": "json_object"}, "guided_regex": "a"},
        "guided_regex",
        "combined",
    ),
    "none of them": ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
    "empty choice": ({"guided_choice": []}, "guided_choice", "at least one"),
    "too long": ({"guided_regex": "a" * 70_000}, "guided_regex", "65,536"),
    "no such format": ({"response_format": {"type": "yaml"}}, "response_format", "json_schema"),
    "ignore_eos": ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "combined"),
    "min_tokens": ({"guided_regex": "a", "min_tokens": 3}, "min_tokens", "combined"),
}


@pytest.mark.parametrize("route", BODIES)
@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cant_be_kept_is_refused(
    server: ServerProcess, route: str, name: str, stream: bool
) -> None:
    fields, param, part = REFUSED[name]
    body = BODIES[route] | fields | {"stream": stream}
    answer = server.http.post(route, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param), error
    assert part in error["message"]


def test_a_catastrophic_one_is_bounded_and_its_neighbours_go_on(server: ServerProcess) -> None:
    """It is refused when its time is up; an answer meanwhile is what it is alone."""
    body = BODIES[CHAT] | {"temperature": 0.0}
    alone = server.http.post(CHAT, json=body).json()["choices"]
    good = server.http.post(CHAT, json=body | {"guided_regex": "a{3}"})
    assert good.json()["choices"][0]["message"]["content"] == "aaa"
    beside: list[Any] = []

    def ask_meanwhile() -> None:
        while not beside or not over.is_set():
            beside.append(server.http.post(CHAT, json=body).json()["choices"])

    over = threading.Event()
    neighbour = threading.Thread(target=ask_meanwhile)
    neighbour.start()
    start = time.monotonic()
    bad = server.http.post(CHAT, json=body | {"guided_regex": "(" * 900 + "a" + "|b)*" * 900})
    over.set()
    neighbour.join()
    assert bad.status_code == 400 and time.monotonic() - start < 40
    assert len(beside) > 3 and all(choices == alone for choices in beside)
    assert server.http.get("/health").status_code == 200
    assert server.http.post(CHAT, json=body).json()["choices"] == alone
    again = server.http.post(CHAT, json=body | {"guided_regex": "b{3}"})
    assert again.json()["choices"][0]["message"]["content"] == "bbb"
