"""Which JSON schemas an answer can be held to.

xgrammar passes over what it can't hold an answer to. Here that is refused by name: a caller who
was promised a schema may rely on all of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from mm_engine.errors import RequestError

PARAM = "structured_outputs"
MAX_DEPTH = 64  # of schemas in schemas
_NOT_KEPT = frozenset(
    {
        "$dynamicRef",
        "$recursiveRef",
        "contains",
        "contentSchema",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "not",
        "then",
        "uniqueItems",
    }
)
#: Words that are passed over where no type stands beside them.
_TYPED = frozenset(
    {
        "exclusiveMaximum",
        "exclusiveMinimum",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "pattern",
        "patternProperties",
        "propertyNames",
    }
)
#: What says something about a value. Other words are notes, as the standard has it.
_SAYS = _TYPED | {
    "$ref",
    "additionalItems",
    "additionalProperties",
    "allOf",
    "anyOf",
    "const",
    "enum",
    "items",
    "multipleOf",
    "oneOf",
    "prefixItems",
    "properties",
    "required",
    "type",
    "unevaluatedItems",
    "unevaluatedProperties",
}
#: Of several that stand beside each other only one is held to.
_WHOLE = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
_IMPLIED = {"const": {"type"}, "enum": {"type"}}  # what may stand beside them: it says no more
#: Beside the first, the others are passed over.
_APART = (
    ("pattern", {"minLength", "maxLength"}),
    ("format", {"minLength", "maxLength", "pattern"}),
    ("properties", {"propertyNames"}),
)
_MAPS = ("properties", "patternProperties", "$defs", "definitions")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_ONES = (
    "items",
    "additionalProperties",
    "additionalItems",
    "unevaluatedProperties",
    "unevaluatedItems",
    "propertyNames",
)


def check_schema(text: str) -> None:
    """Refuse a schema of which a part wouldn't be held to.

    `oneOf` counts as `anyOf`, and `format` is held to where it is a known one, as the standard has
    it. The order of an object's properties is that of the schema, and those it doesn't name come
    only where `additionalProperties` says what they are.

    Raises:
        RequestError: it isn't JSON, no schema, nested too deeply, or asks for more than that.
    """
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError):
        raise _refusal("it is not valid JSON") from None
    waiting: list[tuple[str, Any, int]] = [("#", schema, 0)]
    while waiting:
        path, part, depth = waiting.pop()
        if depth > MAX_DEPTH:
            raise _refusal(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(part, bool):
            continue
        if not isinstance(part, dict):
            raise _refusal(f"{path} must be an object")
        waiting += [(where, inner, depth + 1) for where, inner in _inner(path, part)]
        _check_words(path, part)


def check_regex(pattern: str) -> None:
    """Refuse a regex of which a part would be passed over: lookaheads, and anchors in its middle.

    Raises:
        RequestError: it has one.
    """
    in_class = escaped = False
    depth = 0  # of parentheses
    before = ""  # the character before, unless it was escaped
    for i, char in enumerate(pattern):
        behind = pattern[i + 1 : i + 2]
        last, before = before, char
        if escaped or char == "\\":
            escaped, before = not escaped, "\\"
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif char in "()":
            if char == "(" and pattern[i + 1 : i + 3] in ("?=", "?!"):
                raise _bad_regex("lookaheads can't be held to")
            depth += 1 if char == "(" else -1
        elif (char == "^" and (depth or last not in ("", "|"))) or (
            char == "$" and (depth or behind not in ("", "|"))
        ):
            raise _bad_regex("^ and $ in its middle can't be held to")


def _inner(path: str, part: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The schemas in a schema, each with its place."""
    for key in _MAPS:
        inner = part.get(key, {})
        if not isinstance(inner, dict):
            raise _refusal(f"{path}/{key} must be an object")
        yield from ((f"{path}/{key}/…", value) for value in inner.values())
    for key in _LISTS:
        members = part.get(key, [None])
        if not isinstance(members, list) or not members:
            raise _refusal(f"{path}/{key} must be a list that isn't empty")
        if key in part:
            yield from ((f"{path}/{key}/{i}", member) for i, member in enumerate(members))
    yield from ((f"{path}/{key}", part[key]) for key in _ONES if key in part)


def _check_words(path: str, part: dict[str, Any]) -> None:
    """Refuse the words of one schema that aren't held to, alone or beside others."""
    for key in sorted(_NOT_KEPT & part.keys()):
        if not (key == "uniqueItems" and part[key] is False):
            raise _refusal(f"{path}: {key} can't be held to")
    _check_beside(path, part)
    if len(part.get("allOf", ())) > 1:
        raise _refusal(f"{path}: allOf of several schemas can't be held to")
    if not str(part.get("$ref", "#")).startswith("#"):
        raise _refusal(f"{path}: $ref must point into the schema itself: #/…")
    if "multipleOf" in part and part.get("type") != "integer":
        raise _refusal(f"{path}: multipleOf can't be held to for other types than integer")
    untyped = sorted(_TYPED & part.keys()) if "type" not in part else []
    if untyped:
        raise _refusal(f"{path}: {untyped[0]} can't be held to without a type beside it")
    patterns = [*part.get("patternProperties", {}), part.get("pattern", "")]
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise _refusal(f"{path}/pattern must be a string")
        check_regex(pattern)
    required, known = part.get("required", []), part.get("properties", {})
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise _refusal(f"{path}/required must be a list of strings")
    if any(name not in known for name in required):
        raise _refusal(f"{path}: required names a property that properties doesn't have")


def _check_beside(path: str, part: dict[str, Any]) -> None:
    """Refuse words that stand beside others of which only one is held to."""
    whole = [key for key in _WHOLE if key in part]
    if whole:
        beside = (part.keys() & _SAYS) - {whole[0]} - _IMPLIED.get(whole[0], set())
        if beside:
            raise _refusal(f"{path}: {min(beside)} beside {whole[0]} can't be held to")
        values = part.get("enum", [part["const"]] if "const" in part else [])
        types = part.get("type", [])
        types = types if isinstance(types, list) else [types]
        if types and isinstance(values, list) and not all(_is_one(v, types) for v in values):
            raise _refusal(f"{path}: a value of {whole[0]} isn't of its type")
    for first, others in _APART:
        beside = part.keys() & others if first in part else set()
        if beside:
            raise _refusal(f"{path}: {min(beside)} beside {first} can't be held to")


def _is_one(value: Any, types: list[Any]) -> bool:
    """Whether a value is of one of JSON schema's types."""
    if isinstance(value, bool):
        return "boolean" in types
    if isinstance(value, int | float):
        return "number" in types or (float(value).is_integer() and "integer" in types)
    kinds = {str: "string", list: "array", dict: "object", type(None): "null"}
    return kinds.get(type(value)) in types


def _bad_regex(why: str) -> RequestError:
    return RequestError(f"the regex can't be compiled: {why}. Change it.", param=PARAM)


def _refusal(why: str) -> RequestError:
    return RequestError(f"the JSON schema can't be compiled: {why}. Change it.", param=PARAM)
