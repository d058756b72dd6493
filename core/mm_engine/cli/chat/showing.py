"""An answer on its way to the terminal, and what is said about it afterwards."""

from __future__ import annotations

import sys
import time

import typer

from mm_engine.cli.chat.messages import Piece
from mm_engine.plugins.printable import printable


def write(text: str) -> None:
    """Print a model's text as it is; what a terminal would obey is shown escaped: `\\x1b[31m`."""
    kept = "\t".join(printable(part) for part in text.replace("\r", "").split("\t"))
    sys.stdout.write(kept)
    sys.stdout.flush()


def remark(text: str) -> None:
    """Print a line that isn't part of the conversation."""
    typer.secho(printable(text), dim=True, err=True)


class Shown:
    """An answer, printed as it comes, with its times."""

    def __init__(self) -> None:
        self.text = ""  # without the space that many answers start with
        self.finish_reason: str | None = None
        self._begin = time.perf_counter()
        self._first = self._last = self._begin  # when text came
        self._num_texts = 0
        self._num_tokens: int | None = None
        self._num_prompt_tokens: int | None = None

    def add(self, piece: Piece) -> None:
        """Print what is new."""
        text = piece.text if self.text else piece.text.lstrip()
        if piece.text:
            self._last = time.perf_counter()
            if not self._num_texts:
                self._first = self._last
            self._num_texts += 1
        if piece.num_tokens is not None:
            self._num_tokens = piece.num_tokens
        if piece.num_prompt_tokens is not None:
            self._num_prompt_tokens = piece.num_prompt_tokens
        self.finish_reason = piece.finish_reason or self.finish_reason
        self.text += text
        write(text)

    def status(self, *, stopped: bool) -> str:
        """Tokens, speed and time to first token (TTFT), in a line."""
        num_tokens, about = self._num_tokens, ""
        if num_tokens is None:  # the server hasn't counted them (yet): a text is mostly a token
            num_tokens, about = self._num_texts, "about "
        parts = [f"{about}{num_tokens} token{'s' * (num_tokens != 1)}"]
        seconds = self._last - self._first
        if num_tokens > 1 and seconds > 0:
            rate = (num_tokens - 1) / seconds
            parts.append(f"{rate:,.{0 if rate >= 100 else 1}f} tokens/s")
        if self._num_texts:
            wait = self._first - self._begin
            parts.append(f"TTFT {wait:.2f} s" if wait >= 1 else f"TTFT {wait * 1000:.0f} ms")
        if self._num_prompt_tokens is not None:
            parts.append(f"prompt {self._num_prompt_tokens} tokens")
        if stopped:
            parts.append("stopped")
        elif self.finish_reason == "length":
            parts.append("cut off at the most tokens")
        return " · ".join(parts)
