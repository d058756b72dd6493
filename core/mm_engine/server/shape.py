"""What all bodies that clients send have in common."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

#: Fields that aren't offered, each with the values that ask for nothing.
NotOffered = dict[str, tuple[object, ...]]


class Shape(BaseModel):
    """A JSON object with strict types, whose unknown fields are ignored."""

    model_config = ConfigDict(strict=True, extra="ignore", hide_input_in_errors=True)
    not_offered: ClassVar[NotOffered] = {}
