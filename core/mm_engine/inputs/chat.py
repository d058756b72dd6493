"""From chat messages to token ids. What a user wrote is text, whatever it looks like.

A template turns messages into one string, in which a special token that a user typed looks like
one of the template's own. So each one in a message's text is marked before rendering; the marks
come out again, and the ids of marked special tokens are replaced by those of their characters.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateSyntaxError

from mm_engine.config import ModelContext
from mm_engine.errors import RequestError, StartupError
from mm_engine.plugins.placeholders import image_token

OPEN, CLOSE = "\ue000", "\ue001"  # private use: no meaning of their own in any text
PROBE = "mm engine probe"
ROLE = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


def read_template(ctx: ModelContext, given: str | None) -> str | None:
    """The chat template: `given` (the text, or a path to it), else the checkpoint's own, or None.

    The processor's legacy file comes before the tokenizer's template, which in many checkpoints
    is the text backbone's and knows no images. The new file, chat_template.jinja, is both's.

    Raises:
        StartupError: there is no such file, or it can't be read.
    """
    if given is not None:
        if "{" in given or "\n" in given:
            return given
        return _read(Path(given), "Give a Jinja file's path, or the template itself.")
    legacy = ctx.checkpoint / "chat_template.json"
    if legacy.is_file() and not legacy.with_suffix(".jinja").is_file():
        text = _read(legacy, "Correct it, or give another: --chat-template.")
        try:
            return str(json.loads(text)["chat_template"])
        except (ValueError, KeyError, TypeError) as error:
            raise StartupError(
                f"chat template can't be read: {legacy} ({type(error).__name__}). "
                "Correct it, or give another: --chat-template."
            ) from error
    own = ctx.tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    return str(own) if own else None


def _read(path: Path, remedy: str) -> str:
    try:
        return path.expanduser().read_text("utf-8")
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~name of nobody
        cause = getattr(error, "strerror", None) or type(error).__name__
        raise StartupError(f"chat template can't be read: {path} ({cause}). {remedy}") from error


class ChatRenderer:
    """Renders messages with one template and tokenizes the result."""

    def __init__(
        self, ctx: ModelContext, template: str | None, image_text: Callable[[int], str]
    ) -> None:
        """`image_text(index)` stands for the image of this number in a conversation.

        Raises:
            RequestError: `template` is not valid Jinja.
        """
        self.tokenizer: Any = ctx.tokenizer
        # One of its own: transformers keeps split_special_tokens in the tokenizer, and another
        # thread's image token would be split too.
        self._splitter: Any = copy.deepcopy(ctx.tokenizer)
        self.template = template
        self.image_text = image_text
        self._image_token = image_token(ctx)
        added = self.tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        special |= {image_text(0), self._image_token}
        special |= {t for t in self.tokenizer.all_special_tokens if t}
        longest_first = sorted((t for t in special if t), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)))
        self._starts = frozenset(token[:i] for token in longest_first for i in range(1, len(token)))
        self._longest_start = max(map(len, self._starts), default=0)
        self._takes_parts, self._writes_bare_tokens = self._probe()

    def encode(
        self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True
    ) -> tuple[str, tuple[int, ...]]:
        """The rendered prompt and its ids, each image's placeholder still a single one.

        Content is a string or a list of `{"type": "text", "text": …}` and `{"type": "image"}`.

        Raises:
            RequestError: no template, malformed messages, or the template refuses them.
        """
        if not messages:
            raise RequestError("messages is empty. Send at least one message.", param="messages")
        numbers = itertools.count()  # of the images, through all messages
        rendered = self._render(
            [self._message(i, message, numbers) for i, message in enumerate(messages)],
            add_generation_prompt,
        )
        if self._writes_bare_tokens:
            rendered = self._complete(rendered)
        text, spans = _unmark(rendered)
        bos = self.tokenizer.bos_token
        # As transformers' processors do: a template that writes the BOS token is taken at its word.
        # One that the user typed is text, and begins nothing.
        typed = any(start == 0 for start, _ in spans)
        add_special = typed or not (bos and text.startswith(bos))
        encoding = self.tokenizer(
            text, add_special_tokens=add_special, return_offsets_mapping=bool(spans)
        )
        if not spans:
            return text, tuple(encoding["input_ids"])
        return text, self._as_text(text, spans, encoding)

    def _message(self, index: int, message: Any, numbers: Iterator[int]) -> dict[str, Any]:
        """One message as the template takes it, with special tokens marked."""
        param = f"messages.{index}"
        if not isinstance(message, Mapping):
            raise RequestError("a message must be a mapping with role and content.", param=param)
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or not ROLE.fullmatch(role):
            raise RequestError("role must be a word such as user.", param=f"{param}.role")
        if isinstance(content, str) or content is None:
            parts = [{"type": "text", "text": content or ""}]
        elif isinstance(content, Sequence):
            parts = [self._part(f"{param}.content.{i}", part) for i, part in enumerate(content)]
        else:
            raise RequestError(
                "content must be a string or a list of parts.", param=f"{param}.content"
            )
        for part in parts:
            if part["type"] == "text":
                _check_text(part["text"], param)
                part["text"] = self._mark(part["text"])
        if self._takes_parts:
            return {"role": role, "content": parts}
        texts = [
            self.image_text(next(numbers)) if part["type"] == "image" else part["text"]
            for part in parts
        ]
        return {"role": role, "content": "\n".join(texts)}

    def _mark(self, text: str) -> str:
        """The text with marks around special tokens, and around the start of one at its end.

        Of that one the rest may follow in the next part: templates write parts side by side.
        """
        end = len(text.rstrip())
        longest = min(end, self._longest_start)
        starts = (end - i for i in range(longest, 0, -1) if text[end - i : end] in self._starts)
        start = next(starts, end)
        tail = f"{OPEN}{text[start:end]}{CLOSE}" if start < end else ""
        marked = self._special.sub(lambda found: f"{OPEN}{found[0]}{CLOSE}", text[:start])
        return f"{marked}{tail}{text[end:]}"

    @staticmethod
    def _part(param: str, part: Any) -> dict[str, str]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        if kind == "image":
            return {"type": "image"}
        raise RequestError("a content part must be a text or an image.", param=param)

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        if self.template is None:
            raise RequestError(
                "this checkpoint has no chat template. "
                "Start the server with --chat-template, or use /v1/completions.",
                param="messages",
            )
        try:
            rendered = self.tokenizer.apply_chat_template(
                messages,
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
            )
        except TemplateSyntaxError as error:
            raise RequestError(
                f"the chat template is not valid Jinja: {error} (line {error.lineno}). Correct it.",
                param="chat_template",
            ) from error
        except Exception as error:  # a template is a program: it may raise anything
            raise RequestError(
                f"the chat template refuses these messages: {error}.", param="messages"
            ) from error
        return str(rendered)

    def _probe(self) -> tuple[bool, bool]:
        """Whether the template takes content parts, images among them (old ones take strings).

        And whether it writes the image token alone, where the model wants more around it.
        """
        if self.template is None:
            return False, False
        parts = [{"type": "image"}, {"type": "text", "text": PROBE}]
        try:
            rendered = self._render([{"role": "user", "content": parts}], True)
        except RequestError as error:
            if error.param == "chat_template":
                raise
            return False, False
        complete = self.image_text(0) in rendered
        takes_parts = complete or self._image_token in rendered
        takes_parts = takes_parts and PROBE in rendered and "'type'" not in rendered
        return takes_parts, takes_parts and not complete

    def _complete(self, rendered: str) -> str:
        """Put what the model wants around each image token that the template wrote.

        One that a user wrote is between marks, and stays as it is.
        """
        numbers = itertools.count()
        marked = f"{OPEN}[^{OPEN}{CLOSE}]*{CLOSE}"
        return re.sub(
            f"{marked}|({re.escape(self._image_token)})",
            lambda found: self.image_text(next(numbers)) if found[1] else found[0],
            rendered,
        )

    def _as_text(
        self, text: str, spans: list[tuple[int, int]], encoding: Mapping[str, Any]
    ) -> tuple[int, ...]:
        """The ids, with special tokens inside `spans` replaced by the ids of their characters."""
        ids: list[int] = []
        seen: dict[str, list[int]] = {}  # a text may hold thousands of them
        remaining = list(reversed(spans))
        for token, (start, end) in zip(
            encoding["input_ids"], encoding["offset_mapping"], strict=True
        ):
            while remaining and remaining[-1][1] <= start:
                remaining.pop()
            marked = bool(remaining) and start < remaining[-1][1] and remaining[-1][0] < end
            if marked and self._special.fullmatch(self.tokenizer.convert_ids_to_tokens(token)):
                written = text[start:end]  # the token's own: a span may hold several, or a part
                if written not in seen:
                    seen[written] = self._plain(written)
                ids += seen[written]
            else:
                ids.append(token)
        return tuple(ids)

    def _plain(self, text: str) -> list[int]:
        """Ids of a special token's characters."""

        def split(text: str) -> list[int]:
            ids: list[int] = self._splitter(
                text, add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
            return ids

        # Behind a line's end, since tokenizers may put a space before what begins a text.
        before, ids = split("\n"), split(f"\n{text}")
        ids = ids[len(before) :] if ids[: len(before)] == before else split(text)
        if self.tokenizer.convert_tokens_to_ids(text) not in ids:
            return ids
        # Added, but not as a special token: only taking it apart keeps it from being found.
        pieces = [self.tokenizer(c, add_special_tokens=False)["input_ids"] for c in text]
        return [token for piece in pieces for token in piece]


def _check_text(text: str, param: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            "the text holds half of a surrogate pair. Send valid Unicode.", param=param
        ) from error
    if OPEN in text or CLOSE in text:
        raise RequestError(
            "the text holds a private-use character that is reserved here: U+E000 or U+E001. "
            "Remove it.",
            param=param,
        )


def _unmark(rendered: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and where the marked parts are in it."""
    spans: list[tuple[int, int]] = []
    pieces: list[str] = []
    length = 0
    start: int | None = None
    for piece in re.split(f"([{OPEN}{CLOSE}])", rendered):
        if piece == OPEN:
            start = length
        elif piece == CLOSE:
            # A template may cut a message's text between its two marks: half a pair says nothing.
            if start is not None:
                spans.append((start, length))
            start = None
        else:
            pieces.append(piece)
            length += len(piece)
    return "".join(pieces), spans
