"""What all bodies that clients send have in common."""

from __future__ import annotations

from typing import Annotated, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

T = TypeVar("T")
#: A list that is refused at its first bad item: there may be a million, and an error takes memory
#: and holds up the event loop.
Items = Annotated[list[T], Field(fail_fast=True)]

#: Fields that aren't offered, each with the values that ask for nothing.
NotOffered = dict[str, tuple[object, ...]]


class Shape(BaseModel):
    """A JSON object with strict types, whose unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)
    not_offered: ClassVar[NotOffered] = {}


def at_most(num_entries: int) -> BeforeValidator:
    """A limit to an object's entries that is looked at before they are, for the same reason."""

    def check(value: object) -> object:
        if isinstance(value, dict) and len(value) > num_entries:
            raise PydanticCustomError(
                "too_long", "too many entries: at most {limit} are taken", {"limit": num_entries}
            )
        return value

    return BeforeValidator(check)
