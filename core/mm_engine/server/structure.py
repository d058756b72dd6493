"""Structured output as clients ask for it: OpenAI's `response_format`, and vLLM's fields."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from mm_engine.errors import RequestError
from mm_engine.sampling_params import StructuredOutputsParams
from mm_engine.server.shape import Items, Shape

Json = dict[str, Any] | bool


class TextFormat(Shape):
    """Any text."""

    type: Literal["text"]


class JsonObjectFormat(Shape):
    """A JSON object, whatever is in it."""

    type: Literal["json_object"]


class NamedSchema(Shape):
    """A JSON schema. Answers are always held to it, whatever `strict` says."""

    name: str
    description: str | None = None
    schema_: Annotated[Json | None, Field(alias="schema")] = None
    strict: bool | None = None


class JsonSchemaFormat(Shape):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


ResponseFormat = Annotated[
    TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")
]


class StructuredOutputs(Shape):
    """vLLM's `structured_outputs`: exactly one of these."""

    json_: Annotated[Json | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Items[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None


class StructureFields(Shape):
    """The fields of a request that say what its answer must look like; at most one of them."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Json | str | None = None
    guided_regex: str | None = None
    guided_choice: Items[str] | None = None
    guided_grammar: str | None = None

    _structure: StructuredOutputsParams | None = PrivateAttr(None)

    @property
    def structure_field(self) -> str | None:
        """The field that is given; None if the answer is free.

        Raises:
            RequestError: several are.
        """
        names = [name for name in StructureFields.model_fields if getattr(self, name) is not None]
        if isinstance(self.response_format, TextFormat):
            names.remove("response_format")
        if len(names) > 1:
            raise RequestError(
                f"{names[1]} can't be combined with {names[0]}. Leave one of them out.",
                param=names[1],
            )
        return names[0] if names else None

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """What the answer must look like, if anything; known once `read_structure` was called."""
        return self._structure

    def read_structure(self) -> None:
        """Find `structure`. A schema may be long: where that is possible, not in the event loop.

        Raises:
            RequestError: several fields say it, or one is malformed.
        """
        field = self.structure_field
        if field is None:
            return
        try:
            self._structure = self._make_structure(field)
        except RequestError as error:
            error.param = field
            raise

    def _make_structure(self, field: str) -> StructuredOutputsParams:
        """What `field` says, the one that is given."""
        return StructuredOutputsParams(**self._given(field))

    def _given(self, field: str) -> dict[str, Any]:
        if isinstance(self.response_format, JsonSchemaFormat):
            schema = self.response_format.json_schema.schema_
            return {"json": json.dumps({} if schema is None else schema)}
        if field == "response_format":
            return {"json_object": True}
        if self.structured_outputs is not None:
            given = self.structured_outputs.model_dump(by_alias=True, exclude_none=True)
        else:
            given = {field.removeprefix("guided_"): getattr(self, field)}
        if "json" in given and not isinstance(given["json"], str):
            given["json"] = json.dumps(given["json"])
        return given
