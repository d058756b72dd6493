"""Tools as text: in the prompt's messages, and in what the model writes."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mm_engine.server.responses import ToolCallDelta, ToolCallFunction
from mm_engine.server.tools import (
    AFTER_ARGUMENTS,
    BEFORE_ARGUMENTS,
    BEFORE_NAME,
    CALL_CLOSES,
    CALL_OPENS,
    RESULT_CLOSES,
    RESULT_OPENS,
    ToolCall,
    ToolUse,
)

Content = str | list[dict[str, Any]]


def with_instructions(messages: Sequence[Mapping[str, Any]], use: ToolUse) -> list[dict[str, Any]]:
    """The messages, with what the model is told of the tools in the system message."""
    told = [dict(message) for message in messages]
    if told and told[0]["role"] == "system":
        told[0]["content"] = joined([told[0]["content"], use.instructions])
    else:
        told.insert(0, {"role": "system", "content": use.instructions})
    return told


def written(calls: Iterable[ToolCall]) -> str:
    """Calls of an earlier turn, as the model wrote them."""
    return "\n".join(
        f"{CALL_OPENS}{BEFORE_NAME}{call.function.name}{BEFORE_ARGUMENTS}"
        f"{call.function.arguments}{AFTER_ARGUMENTS}{CALL_CLOSES}"
        for call in calls
    )


def result(content: Content) -> Content:
    """What a tool gave, as the model is told."""
    return joined([f"{RESULT_OPENS}\n", content, f"\n{RESULT_CLOSES}"], "")


def joined(contents: Sequence[Content], between: str = "\n\n") -> Content:
    """Several contents in one: a text if all are, else parts."""
    if all(isinstance(content, str) for content in contents):
        return between.join(str(content) for content in contents if content)
    parts: list[dict[str, Any]] = []
    for content in contents:
        if not content:
            continue
        if parts and between:
            parts.append({"type": "text", "text": between})
        parts += [{"type": "text", "text": content}] if isinstance(content, str) else content
    return parts


@dataclass(slots=True)
class News:
    """What is new of an answer: text outside of calls, and parts of calls."""

    text: str = ""
    calls: list[ToolCallDelta] = field(default_factory=list)


class ToolCallReader:
    """Finds the calls in an answer as it comes. A grammar has seen to their form."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._held = ""  # what may be the beginning of something
        self.in_call = False  # and not yet behind its end
        self._depth: int | None = None  # of the arguments' brackets; None: before or behind them
        self._in_string = self._escaped = False

    def push(self, text: str, *, last: bool) -> News:
        """Take more of the answer. Of the `last` piece nothing is held back."""
        news = News()
        self._held += text
        while self._step(news):
            pass
        if last and not self.in_call:
            news.text += self._held
            self._held = ""
        return news

    def _step(self, news: News) -> bool:
        """Read on; whether there may be more to read."""
        if not self.in_call:
            return self._read_text(news)
        if self._depth is None:
            return self._read_head(news)
        return self._read_arguments(news)

    def _read_text(self, news: News) -> bool:
        before, opens, behind = self._held.partition(CALL_OPENS)
        if opens:
            # The line's end before a call belongs to it, as that between two calls does.
            news.text += before.removesuffix("\n")
            self._held, self.in_call = behind, True
            return True
        keep = _num_begun(before, f"\n{CALL_OPENS}", CALL_OPENS)
        news.text += before[: len(before) - keep]
        self._held = before[len(before) - keep :]
        return False

    def _read_head(self, news: News) -> bool:
        """Up to the arguments, or (behind them) to the call's end."""
        if self._held.startswith(BEFORE_NAME) and BEFORE_ARGUMENTS in self._held:
            name, _, self._held = self._held[len(BEFORE_NAME) :].partition(BEFORE_ARGUMENTS)
            function = ToolCallFunction(name=name, arguments="")
            news.calls.append(
                ToolCallDelta(
                    index=self.num_calls,
                    id=f"call_{uuid.uuid4().hex}",
                    type="function",
                    function=function,
                )
            )
            self.num_calls += 1
            self._depth = 0
            return True
        _, closes, behind = self._held.partition(CALL_CLOSES)
        if closes:
            self._held, self.in_call = behind, False
        return bool(closes)

    def _read_arguments(self, news: News) -> bool:
        """Up to the end of the arguments, which are an object.

        Of strings whose length is bounded the grammar lets control characters through, which JSON
        hasn't: they are escaped here.
        """
        assert self._depth is not None
        written, self._held = self._held, ""
        arguments = ""
        for end, char in enumerate(written, start=1):
            arguments += json.dumps(char)[1:-1] if self._in_string and char < " " else char
            if self._escaped:
                self._escaped = False
            elif self._in_string:
                self._escaped, self._in_string = char == "\\", char != '"'
            elif char == '"':
                self._in_string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    self._held = written[end:]
                    self._depth = None
                    break
        if arguments:
            function = ToolCallFunction(arguments=arguments)
            news.calls.append(ToolCallDelta(index=self.num_calls - 1, function=function))
        return self._depth is None


def _num_begun(text: str, *marks: str) -> int:
    """How many characters at the end of `text` may be the beginning of a mark."""
    for mark in sorted(marks, key=len, reverse=True):
        for length in range(min(len(mark) - 1, len(text)), 0, -1):
            if text.endswith(mark[:length]):
                return length
    return 0
