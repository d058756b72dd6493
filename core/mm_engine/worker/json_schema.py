"""Which JSON schemas an answer can be held to.

xgrammar passes over what it can't hold an answer to. Here that is refused by name: a caller who
was promised a schema may rely on all of it.
"""

from __future__ import annotations

import json
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
#: What says something about a value. Other words are notes, as the standard has it.
_SAYS = frozenset(
    {
        "$ref",
        "additionalItems",
        "additionalProperties",
        "allOf",
        "anyOf",
        "const",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "items",
        "maxItems",
        "maxLength",
        "maxProperties",
        "maximum",
        "minItems",
        "minLength",
        "minProperties",
        "minimum",
        "multipleOf",
        "oneOf",
        "pattern",
        "patternProperties",
        "prefixItems",
        "properties",
        "propertyNames",
        "required",
        "type",
        "unevaluatedItems",
        "unevaluatedProperties",
    }
)
#: Of several that stand beside each other only one is held to.
_WHOLE = ("$ref", "anyOf", "oneOf", "allOf", "const", "enum")
_IMPLIED = {"const": {"type"}, "enum": {"type"}}  # what may stand beside them: it says no more
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
        _check_keywords(path, part)
        for key in _MAPS:
            inner = part.get(key, {})
            if not isinstance(inner, dict):
                raise _refusal(f"{path}/{key} must be an object")
            waiting += [(f"{path}/{key}/…", value, depth + 1) for value in inner.values()]
        for key in _LISTS:
            members = part.get(key, [])
            if not isinstance(members, list):
                raise _refusal(f"{path}/{key} must be a list")
            waiting += [(f"{path}/{key}/{i}", m, depth + 1) for i, m in enumerate(members)]
        waiting += [(f"{path}/{key}", part[key], depth + 1) for key in _ONES if key in part]


def check_regex(pattern: str) -> None:
    """Refuse a regex of which a part would be passed over: lookaheads, and anchors in its middle.

    Raises:
        RequestError: it has one.
    """
    in_class = escaped = False
    for i, char in enumerate(pattern):
        if escaped or char == "\\":
            escaped = not escaped
        elif in_class:
            in_class = char != "]"
        elif char == "[":
            in_class = True
        elif pattern[i : i + 3] in ("(?=", "(?!"):
            raise _bad_regex("lookaheads can't be held to")
        elif (char == "^" and pattern[:i][-1:] not in ("", "(", "|", ":")) or (
            char == "$" and pattern[i + 1 : i + 2] not in ("", ")", "|")
        ):
            raise _bad_regex("^ and $ in its middle can't be held to")


def _bad_regex(why: str) -> RequestError:
    return RequestError(f"the regex can't be compiled: {why}. Change it.", param=PARAM)


def _check_keywords(path: str, part: dict[str, Any]) -> None:
    for key in sorted(_NOT_KEPT & part.keys()):
        if not (key == "uniqueItems" and part[key] is False):
            raise _refusal(f"{path}: {key} can't be held to")
    whole = [key for key in _WHOLE if key in part]
    if whole:
        beside = (part.keys() & _SAYS) - {whole[0]} - _IMPLIED.get(whole[0], set())
        if beside:
            raise _refusal(f"{path}: {min(beside)} beside {whole[0]} can't be held to")
    if isinstance(part.get("allOf"), list) and len(part["allOf"]) > 1:
        raise _refusal(f"{path}: allOf of several schemas can't be held to")
    if not str(part.get("$ref", "#")).startswith("#"):
        raise _refusal(f"{path}: $ref must point into the schema itself: #/…")
    if "multipleOf" in part and part.get("type") != "integer":
        raise _refusal(f"{path}: multipleOf can't be held to for other types than integer")
    if isinstance(part.get("pattern"), str):
        check_regex(part["pattern"])
    for pattern in part.get("patternProperties", {}):
        check_regex(pattern)
    if "pattern" in part and ("minLength" in part or "maxLength" in part):
        raise _refusal(f"{path}: minLength or maxLength beside pattern can't be held to")
    required, known = part.get("required", []), part.get("properties", {})
    if not isinstance(required, list):
        raise _refusal(f"{path}/required must be a list")
    if isinstance(known, dict) and any(name not in known for name in required):
        raise _refusal(f"{path}: required names a property that properties doesn't have")


def _refusal(why: str) -> RequestError:
    return RequestError(f"the JSON schema can't be compiled: {why}. Change it.", param=PARAM)
