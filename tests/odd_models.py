"""One-file plugins for the demo whose answers tests can rely on: without an end, at a pace that no
server misses, or with control characters."""

from __future__ import annotations

from pathlib import Path

#: The demo without an end of its answers, and with time to do something meanwhile.
ENDLESS = """
import time

from mm_engine.plugins import hookimpl
from mm_llava.model import LlavaForConditionalGeneration
from mm_llava.plugin import max_tokens


class Endless(LlavaForConditionalGeneration):
    def __init__(self, ctx):
        super().__init__(ctx)
        self.eos = ctx.tokenizer.eos_token_id

    def compute_logits(self, hidden):
        logits = super().compute_logits(hidden).clone()
        logits[:, self.eos] = -1e4
        time.sleep(0.02)
        return logits


@hookimpl
def model_class(ctx):
    return Endless
"""
#: The demo at a pace at which no server is late: each token comes by itself.
PACED = """
import time

from mm_engine.plugins import hookimpl
from mm_llava.model import LlavaForConditionalGeneration
from mm_llava.plugin import max_tokens


class Paced(LlavaForConditionalGeneration):
    def compute_logits(self, hidden):
        time.sleep(0.03)
        return super().compute_logits(hidden)


@hookimpl
def model_class(ctx):
    return Paced
"""
#: A demo that says the control character that begins a terminal's commands, and nothing else.
ESCAPING = """
from mm_engine.plugins import hookimpl
from mm_llava.model import LlavaForConditionalGeneration
from mm_llava.plugin import max_tokens


class Escaping(LlavaForConditionalGeneration):
    def __init__(self, ctx):
        super().__init__(ctx)
        self.escape = ctx.tokenizer.convert_tokens_to_ids("\\u011b")  # byte 27, byte-level

    def compute_logits(self, hidden):
        logits = super().compute_logits(hidden).clone()
        logits[:, self.escape] = 1e4
        return logits


@hookimpl
def model_class(ctx):
    return Escaping
"""


def plugin_flags(folder: Path, code: str) -> tuple[str, ...]:
    """Flags with which an engine runs the demo with the plugin `code`, written into `folder`."""
    file = folder / "odd_plugin.py"
    file.write_text(code)
    return ("--plugin", str(file), "--enforce-eager", "--kv-cache-memory", "32MiB")
