"""What the user writes: lines, texts of several lines, Tab where readline is there."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

from mm_engine.cli.chat.commands import completions
from mm_engine.errors import RequestError

QUOTES = '"""'
PROMPT, MORE = "> ", ". "


@dataclass(frozen=True, slots=True)
class Entry:
    """What was written in one go."""

    text: str
    is_command: bool = False


class Reader:
    """Reads from stdin; as one who types there wants it if they do (`interactive`)."""

    def __init__(self, *, interactive: bool) -> None:
        self._prompts = interactive
        for stream in (sys.stdin, sys.stdout):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="replace")  # no byte or character ends the conversation
        if interactive:
            _complete_with_tab()

    def read(self) -> Entry:
        """The next message or command; its text may be empty.

        Raises:
            EOFError: there is no more.
            RequestError: nor is there the end of a text that was begun.
        """
        line = self._line(PROMPT)
        if line.lstrip().startswith(QUOTES):
            return Entry(self._to_the_quotes(line.lstrip().removeprefix(QUOTES)))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1][:-1]
            lines.append(self._more("a \\ at a line's end wants another line"))
        text = "\n".join(lines)
        return Entry(text.strip(), text.startswith("/"))

    def _to_the_quotes(self, line: str) -> str:
        lines = [line]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self._more(f"{QUOTES} wants another {QUOTES}"))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip()

    def _more(self, wanted: str) -> str:
        try:
            return self._line(MORE)
        except EOFError:
            raise RequestError(f"the input ends inside of a message: {wanted}. End it.") from None

    def _line(self, prompt: str) -> str:
        return input(prompt if self._prompts else "")


def _complete_with_tab() -> None:
    try:
        import readline
    except ImportError:  # a Python without it; then lines are typed without help
        return
    found: list[str] = []

    def complete(word: str, number: int) -> str | None:
        """The `number`th continuation of the word that the cursor is in (called by readline)."""
        if number == 0:
            line = readline.get_line_buffer()[: readline.get_endidx()]
            found[:] = [whole[readline.get_begidx() :] for whole in completions(line)]
        return found[number] if number < len(found) else None

    readline.set_completer_delims(" ")
    readline.set_completer(complete)
    libedit = "libedit" in (readline.__doc__ or "")
    readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
