"""The nouns of a conversation: what is said, what is new of an answer, and who gives it."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mm_engine.cli.pictures import Picture
from mm_engine.sampling_params import SamplingParams


@dataclass(frozen=True, slots=True)
class Message:
    """One message. Its pictures come before its text."""

    role: Literal["system", "user", "assistant"]
    text: str
    pictures: tuple[Picture, ...] = ()

    def content(self, parts: Sequence[dict[str, Any]]) -> str | list[dict[str, Any]]:
        """What a chat message holds; `parts` are the pictures as its receiver wants them."""
        return [*parts, {"type": "text", "text": self.text}] if parts else self.text


@dataclass(frozen=True, slots=True)
class Turn:
    """A question and what was answered, or as much of it as there is when it was stopped."""

    question: Message
    answer: Message


@dataclass(frozen=True, slots=True)
class Piece:
    """What is new of an answer. Counts are of all so far; None: not told."""

    text: str = ""
    num_tokens: int | None = None  # of the answer
    num_prompt_tokens: int | None = None  # pictures included
    finish_reason: str | None = None  # OpenAI's: "stop", "length"


class Model(Protocol):
    """Who answers: a model in a process of ours, or a server."""

    #: What it is, in a few words for the user.
    description: str
    #: A picture that it brings along to be asked about.
    example: Path | None

    def answer(
        self, messages: Sequence[Message], params: SamplingParams
    ) -> Generator[Piece, None, None]:
        """Answer the last message, as it comes. Closing the generator stops the answer.

        Ctrl-C may come at any time, as `KeyboardInterrupt`.

        Raises:
            MMEngineError: there is no answer, or no more of it.
        """
