"""Which schemas an answer can be held to; the others are refused."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from mm_engine.errors import RequestError
from mm_engine.sampling_params import StructuredOutputsParams
from mm_engine.worker.grammars import Grammars
from mm_engine.worker.json_schema import check_regex
from structured import answer

OBJECT = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "string", "not": {"const": "a"}},
        {**OBJECT, "if": {"required": ["a"]}, "then": {"required": ["b"]}},
        {"type": "array", "contains": {"const": 5}},
        {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        {"type": "number", "multipleOf": 0.5},
        {"type": "string", "pattern": "^a+$", "maxLength": 2},
        {"type": "string", "pattern": "^(?!b)a"},
        {**OBJECT, "dependentRequired": {"a": ["b"]}},
        {"allOf": [{**OBJECT, "required": ["a"]}, {**OBJECT, "required": ["b"]}]},
        {"type": "integer", "anyOf": [{"minimum": 3}, {"minimum": 5}]},
        {"$ref": "#/$defs/n", "minimum": 4, "$defs": {"n": {"type": "integer"}}},
        {"$ref": "https://example.com/schema"},
        {**OBJECT, "required": ["c"]},
        {"properties": {"deep": {"items": {"not": {}}}}},
        {"$defs": {"n": {"uniqueItems": True}}},
        {"minimum": 5},
        {"minLength": 5},
        {"minItems": 2},
        {"patternProperties": {"^a$": {"type": "integer"}}},
        {"type": "string", "format": "email", "maxLength": 2},
        {"type": "string", "format": "email", "pattern": "^x+$"},
        {**OBJECT, "propertyNames": {"pattern": "^a$"}},
        {"allOf": []},
        {"type": "integer", "enum": ["a"]},
        {"type": "integer", "const": True},
        {"type": "string", "pattern": "x(^a)"},
        {"type": "string", "pattern": "(a$)b"},
        {"type": "object", "patternProperties": 5},
        {"type": "object", "patternProperties": [5]},
        {"type": "object", "required": [["x"]]},
        {"type": "object", "required": "a"},
        {"type": "string", "pattern": 5},
        {"type": "object", "properties": []},
        {"anyOf": {"type": "integer"}},
        {"items": [{"type": "integer"}]},
        [],
    ],
    ids=str,
)
def test_a_schema_that_would_be_kept_only_in_part_is_refused(
    grammars: Grammars, schema: Any
) -> None:
    with pytest.raises(RequestError, match="the JSON schema can't be compiled|the regex can't be"):
        grammars.compile(StructuredOutputsParams(json=json.dumps(schema)))


@pytest.mark.parametrize(
    "schema",
    [
        {},
        True,
        {**OBJECT, "title": "T", "description": "D", "x-mine": 1, "default": {"not": 1}},
        {"type": "object", "properties": {"not": {"type": "integer"}, "if": {}}},
        {"const": {"not": 1, "contains": [1]}},
        {"enum": [{"if": 1}], "type": "object"},
        {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None, "title": "T"},
        {"$ref": "#/$defs/n", "description": "D", "$defs": {"n": {"type": "integer"}}},
        {"type": "array", "items": {"$ref": "#"}, "uniqueItems": False},
        {"type": "string", "format": "date-time"},
        {"type": "integer", "multipleOf": 5},
        {"allOf": [{"type": "integer"}]},
        {"type": ["integer", "null"], "minimum": 5},
        {"type": "number", "enum": [1, 2.5]},
        {"type": "integer", "const": 2.0},
        {"type": "string", "pattern": "^a$|^b$"},
        {"type": "string", "pattern": r"[(^$]\^\$"},
    ],
    ids=str,
)
def test_other_schemas_are_taken(grammars: Grammars, schema: Any) -> None:
    assert grammars.compile(StructuredOutputsParams(json=schema))


def limits(least: str, most: str, high: int) -> st.SearchStrategy[dict[str, int]]:
    """Both, one or none of a pair of limits."""
    pair = st.lists(st.integers(0, high), min_size=2, max_size=2).map(sorted)
    return st.tuples(pair, st.booleans(), st.booleans()).map(
        lambda told: {
            **({least: told[0][0]} if told[1] else {}),
            **({most: told[0][1]} if told[2] else {}),
        }
    )


def typed(name: str, more: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return more.map(lambda words: {"type": name, **words})


def objects(values: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.dictionaries(st.sampled_from("abc"), values, max_size=3).flatmap(
        lambda known: st.fixed_dictionaries(
            {
                "type": st.just("object"),
                "properties": st.just(known),
                "required": st.lists(st.sampled_from(sorted(known)), unique=True)
                if known
                else st.just([]),
            },
            optional={"additionalProperties": st.just(False) | values},
        )
    )


schemas = st.recursive(
    typed("integer", limits("minimum", "maximum", 40))
    | typed("integer", limits("exclusiveMinimum", "exclusiveMaximum", 40))
    | typed("number", limits("minimum", "maximum", 40))
    | typed("string", limits("minLength", "maxLength", 5))
    | typed(
        "string",
        st.sampled_from(["^a+$", "^[a-c]{2,3}$", "^x|y$"]).map(
            lambda pattern: {"pattern": pattern}
        ),
    )
    | st.sampled_from([{"enum": ["a", 1, None]}, {"const": {"a": [1]}}, {"type": "boolean"}])
    | st.sampled_from([{"type": ["integer", "null"], "minimum": 3}, {"type": "null"}]),
    lambda inner: (
        typed(
            "array",
            st.tuples(inner, limits("minItems", "maxItems", 3)).map(
                lambda told: {"items": told[0], **told[1]}
            ),
        )
        | objects(inner)
        | st.lists(inner, min_size=1, max_size=3).map(lambda many: {"anyOf": many})
    ),
    max_leaves=4,
)


@settings(max_examples=120, deadline=None)
@given(schemas, st.integers(0, 99))
def test_answers_are_valid_by_another_reading_of_the_schema(
    grammars: Grammars, tokenizer: Any, schema: dict[str, Any], seed: int
) -> None:
    try:
        text = answer(grammars, tokenizer, seed, max_tokens=120, json=schema)
    except RequestError as refused:
        event(f"refused: {str(refused)[:70]}")
        return
    event("cut off" if text is None else "whole")
    told = None if text is None else json.loads(text)
    if text is not None and "inf" not in repr(told):  # 1E999 is a number, but not Python's
        assert jsonschema_rs.is_valid(schema, told), (schema, text)


def test_a_schema_without_bottom_is_refused(grammars: Grammars) -> None:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(100):
        schema = {"type": "array", "items": schema}
    with pytest.raises(RequestError, match="nested more than"):
        grammars.compile(StructuredOutputsParams(json=schema))


def test_a_regex_of_a_million_characters_is_looked_through_once() -> None:
    """Looking back from each of them would take hours."""
    check_regex("^|" * 500_000)
