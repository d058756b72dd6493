"""A workload as bodies of HTTP requests, with as many tokens as asked when the server counts."""

from __future__ import annotations

import base64
import io
import json
from typing import TYPE_CHECKING, Any, Literal, get_args

from mm_engine.cli.bench.workload import Workload

if TYPE_CHECKING:
    from PIL import Image

Endpoint = Literal["/v1/chat/completions", "/v1/completions"]
CHAT, COMPLETIONS = get_args(Endpoint)
JPEG_QUALITY = 90


class Bodies:
    """Bodies that ask `model` for the prompts of a workload, streamed and to their full length.

    `num_extra_tokens` is what the server adds to a text: a template's words, a token at the start.
    """

    def __init__(
        self, workload: Workload, model: str, endpoint: Endpoint, num_extra_tokens: int = 0
    ) -> None:
        self.workload = workload
        self.model = model
        self.endpoint = endpoint
        self.num_extra_tokens = num_extra_tokens

    def body(self, index: int) -> bytes:
        """The body that asks for prompt `index`."""
        shape = self.workload.shape
        text = self.workload.text(index, max(1, shape.input_len - self.num_extra_tokens))
        return self._body(text, self.workload.images(index), shape.output_len)

    def trial(self, num_tokens: int) -> bytes:
        """A body that asks for one token after a text of `num_tokens`, and the prefix."""
        return self._body(self.workload.text(0, num_tokens), [], 1)

    def _body(self, text: str, images: list[Image.Image], max_tokens: int) -> bytes:
        prefix = self.workload.prefix() if self.workload.shape.prefix_len else ""
        asked: dict[str, Any] = {
            "model": self.model,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,  # an answer has the length asked for
            "skip_special_tokens": False,  # each token is seen when it comes
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self.endpoint == COMPLETIONS:
            asked["prompt"] = prefix + text
        else:
            parts: list[dict[str, Any]] = [
                {"type": "image_url", "image_url": {"url": data_url(image)}} for image in images
            ]
            content = [*parts, {"type": "text", "text": text}] if images else text
            messages = [{"role": "user", "content": content}]
            if prefix:  # many templates put images before all text of their message
                messages.insert(0, {"role": "system", "content": prefix})
            asked["messages"] = messages
        return json.dumps(asked).encode()


def data_url(image: Image.Image) -> str:
    """An image as a JPEG in a data URL."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
