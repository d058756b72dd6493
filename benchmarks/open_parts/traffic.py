"""What clients of an open server send: all kinds of requests, some bad, some given up on.

Each request follows from the seed and its number alone, whatever came before it.
"""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image, ImageDraw

CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
SHARE_BAD = 0.05
SHARE_LEAVING = 0.05  # of all; their clients go away somewhere on the way
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange", "black", "white")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
QUESTIONS = ("Describe the image.", "How many objects are there?", "What colour is the circle?")
WORDS = ("a", "small", "large", "and", "is", "the", "left", "of", *COLOURS, *SHAPES)
NUM_SHARED_PICTURES = 8  # that are asked about again and again
MAX_EVENTS = 12  # of a stream, after which a client leaves

Leaves = Literal["", "in its body", "after a time", "after some events"]


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: what is sent, and what may come of it."""

    kind: str
    path: str
    body: bytes
    stream: bool = False
    method: str = "POST"
    bad: bool = False  # it has to be refused
    leaves: Leaves = ""
    leaves_after: float = 0.0  # a share of the body, seconds or events


class Traffic:
    """The requests by number."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        rng = random.Random(f"pictures {seed}")
        self._shared = [picture(rng) for _ in range(NUM_SHARED_PICTURES)]

    def asked(self, number: int) -> Asked:
        """Request `number`."""
        rng = random.Random(f"{self.seed} {number}")
        chance = rng.random()
        if chance < SHARE_BAD:
            kind = rng.choice(sorted(BAD))
            return replace(BAD[kind](rng), kind=f"bad: {kind}", bad=True)
        asked = rng.choices(GOOD, weights=WEIGHTS)[0](self, rng)
        if chance >= SHARE_BAD + SHARE_LEAVING:
            return asked
        ways: list[tuple[Leaves, float]] = [
            ("in its body", rng.random()),
            ("after a time", rng.choice((0.0, 0.05, 0.3)) * rng.random()),
        ]
        if asked.stream:
            ways += 2 * [("after some events", float(rng.randint(1, MAX_EVENTS)))]
        leaves, after = rng.choice(ways)
        return replace(asked, leaves=leaves, leaves_after=after)

    def chat_text(self, rng: random.Random) -> Asked:
        """A conversation without pictures."""
        turns = [{"role": "user", "content": words(rng, 40)}]
        if rng.random() < 0.3:
            turns += [{"role": "assistant", "content": words(rng, 8)}, *turns]
        return self._generation(rng, "chat, text", CHAT, messages=turns)

    def chat_known_picture(self, rng: random.Random) -> Asked:
        """A question about a picture that others ask about, too."""
        return self._about(rng, "chat, known picture", [rng.choice(self._shared)])

    def chat_new_picture(self, rng: random.Random) -> Asked:
        """A question about a picture that nobody has sent before."""
        return self._about(rng, "chat, new picture", [picture(rng)])

    def chat_pictures(self, rng: random.Random) -> Asked:
        """A question about several pictures."""
        pictures = [picture(rng), *rng.sample(self._shared, rng.randint(1, 2))]
        return self._about(rng, "chat, several pictures", pictures)

    def completion(self, rng: random.Random) -> Asked:
        """A text to go on with."""
        return self._generation(rng, "completion", COMPLETIONS, prompt=words(rng, 60))

    def completions(self, rng: random.Random) -> Asked:
        """Several texts to go on with, each in several ways."""
        prompts = [words(rng, 20) for _ in range(rng.randint(2, 4))]
        fields = {"n": rng.randint(1, 3), "seed": rng.randrange(2**31), "temperature": 1.0}
        return self._generation(
            rng, "completion, several prompts", COMPLETIONS, prompt=prompts, **fields
        )

    def chat_choices(self, rng: random.Random) -> Asked:
        """Several answers to one question (`n`), with log-probabilities."""
        fields = {"n": rng.randint(2, 4), "temperature": 0.8, "logprobs": True, "top_logprobs": 3}
        turns = [message(QUESTIONS[0], [rng.choice(self._shared)])]
        return self._generation(rng, "chat, n > 1", CHAT, messages=turns, **fields)

    def response(self, rng: random.Random) -> Asked:
        """The same by OpenAI's newer API."""
        parts: list[dict[str, Any]] = [{"type": "input_text", "text": rng.choice(QUESTIONS)}]
        if rng.random() < 0.6:
            parts.insert(0, {"type": "input_image", "image_url": rng.choice(self._shared)})
        fields = {"input": [{"role": "user", "content": parts}], "max_output_tokens": 24}
        asked = self._generation(rng, "response", RESPONSES, **fields)
        body = json.loads(asked.body)
        del body["max_tokens"]
        return replace(asked, body=json.dumps(body).encode())

    def structured(self, rng: random.Random) -> Asked:
        """An answer that has to keep to a schema, a pattern or a list."""
        properties = {f"p{rng.randrange(20)}": {"type": "integer", "maximum": rng.randint(1, 99)}}
        schema = {"type": "object", "properties": properties, "required": [*properties]}
        ways: list[dict[str, Any]] = [
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "told", "schema": schema},
                }
            },
            {"structured_outputs": {"regex": f"[a-f]{{{rng.randint(1, 6)}}}"}},
            {"structured_outputs": {"choice": rng.sample(SHAPES, 3)}},
        ]
        turns = [{"role": "user", "content": words(rng, 10)}]
        return self._generation(rng, "structured", CHAT, messages=turns, **rng.choice(ways))

    def tools(self, rng: random.Random) -> Asked:
        """A question with tools, one of which has to be called or may be."""
        parameters = {
            "type": "object",
            "properties": {"colour": {"enum": list(COLOURS)}},
            "required": ["colour"],
        }
        tools = [
            {"type": "function", "function": {"name": name, "parameters": parameters}}
            for name in ("paint", "wipe")
        ]
        choice = rng.choice(("required", "auto"))
        turns = [{"role": "user", "content": words(rng, 10)}]
        return self._generation(
            rng, "tools", CHAT, messages=turns, tools=tools, tool_choice=choice, max_tokens=64
        )

    def tokenize(self, rng: random.Random) -> Asked:
        """Token ids of a conversation with a picture, or of a text; or back."""
        body: dict[str, Any] = {"prompt": words(rng, 200)}
        if rng.random() < 0.3:
            ids = [rng.randrange(4, 400) for _ in range(50)]
            return Asked("detokenize", DETOKENIZE, _json({"tokens": ids}))
        if rng.random() < 0.3:
            body = {"messages": [message(QUESTIONS[1], [rng.choice(self._shared)])]}
        return Asked("tokenize", TOKENIZE, _json(body))

    def _about(self, rng: random.Random, kind: str, pictures: list[str]) -> Asked:
        turns = [message(rng.choice(QUESTIONS), pictures)]
        return self._generation(rng, kind, CHAT, messages=turns)

    def _generation(self, rng: random.Random, kind: str, path: str, **fields: Any) -> Asked:
        stream = rng.random() < 0.5
        body = {"max_tokens": rng.choice((1, 8, 24, 96)), **fields, "stream": stream}
        if kind in ("chat, text", "completion"):
            body["ignore_eos"] = True
        return Asked(kind, path, _json(body), stream)


GOOD: tuple[Callable[[Traffic, random.Random], Asked], ...] = (
    *(Traffic.chat_text, Traffic.chat_known_picture, Traffic.chat_new_picture),
    *(Traffic.chat_pictures, Traffic.completion, Traffic.completions, Traffic.chat_choices),
    *(Traffic.response, Traffic.structured, Traffic.tools, Traffic.tokenize),
)
WEIGHTS = (20, 15, 15, 4, 14, 4, 5, 10, 4, 4, 5)


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


def words(rng: random.Random, most: int) -> str:
    """A text of up to so many words that the demo knows."""
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


def picture(rng: random.Random) -> str:
    """A new picture as a data URL: coloured discs on grey."""
    side = rng.choice((64, 96, 160))
    image = Image.new("RGB", (side, side), (128, 128, rng.randrange(256)))
    draw = ImageDraw.Draw(image)
    for _ in range(rng.randint(1, 3)):
        x, y, r = (rng.randrange(side), rng.randrange(side), rng.randint(4, side // 4))
        colour = (rng.randrange(256), rng.randrange(256), rng.randrange(256))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=colour)
    file = io.BytesIO()
    kind = rng.choice(("PNG", "JPEG", "WEBP"))
    image.save(file, kind)
    return data_url(file.getvalue(), kind.lower())


def data_url(encoded: bytes, kind: str = "png") -> str:
    """A file as a data URL, whether or not it is a picture."""
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode('ascii')}"


def message(text: str, pictures: list[str]) -> dict[str, Any]:
    """A user's turn: pictures, then a text."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": url}} for url in pictures
    ]
    return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}


def _bad_chat(**fields: Any) -> Callable[[random.Random], Asked]:
    body = {"messages": [{"role": "user", "content": "circle"}], "max_tokens": 4, **fields}
    return lambda rng: Asked("", CHAT, _json(body | {"stream": rng.random() < 0.5}))


def _bad_picture(make: Callable[[random.Random], str]) -> Callable[[random.Random], Asked]:
    return lambda rng: Asked("", CHAT, _json({"messages": [message("circle", [make(rng)])]}))


def _bad_bytes(body: bytes, path: str = COMPLETIONS, method: str = "POST") -> Any:
    return lambda rng: Asked("", path, body, method=method)


def _cut_off(rng: random.Random) -> str:
    encoded = base64.b64decode(picture(rng).partition(",")[2])
    return data_url(encoded[: len(encoded) // 2])


#: Bad input by what is wrong with it.
BAD: dict[str, Callable[[random.Random], Asked]] = {
    "no JSON": _bad_bytes(b'{"prompt": '),
    "random bytes": lambda rng: Asked("", CHAT, rng.randbytes(300)),
    "nothing": _bad_bytes(b""),
    "nested deeply": _bad_bytes(b"[" * 100_000),
    "no such route": _bad_bytes(b"{}", "/v2/completions"),
    "another method": _bad_bytes(b"", CHAT, "GET"),
    "no messages": _bad_chat(messages=[]),
    "unknown role": _bad_chat(messages=[{"role": "wizard", "content": "circle"}]),
    "unknown model": _bad_chat(model="nobody"),
    "negative length": _bad_chat(max_tokens=-1),
    "huge length": _bad_chat(max_tokens=10**9),
    "a string for a number": _bad_chat(temperature="hot"),
    "n of a million": _bad_chat(n=10**6),
    "unknown characters": _bad_chat(messages=[{"role": "user", "content": "\ue000\ue001"}]),
    "too long": _bad_bytes(_json({"prompt": "circle " * 8000})),
    "ids out of range": _bad_bytes(_json({"prompt": [1, 10**6]})),
    "bad pattern": _bad_chat(structured_outputs={"regex": "(["}),
    "bad schema": _bad_chat(structured_outputs={"json": {"type": "no such type"}}),
    "unknown tool": _bad_chat(tool_choice={"type": "function", "function": {"name": "x"}}),
    "no picture": _bad_picture(lambda rng: data_url(rng.randbytes(200))),
    "no base64": _bad_picture(lambda rng: "data:image/png;base64,!!!"),
    "picture cut off": _bad_picture(_cut_off),
    "picture elsewhere": _bad_picture(lambda rng: "http://127.0.0.1:9/x.png"),
    "picture in a file": _bad_picture(lambda rng: "file:///etc/hostname"),
    "too many pictures": lambda rng: Asked(
        "", CHAT, _json({"messages": [message("circle", 9 * [picture(rng)])]})
    ),
}
