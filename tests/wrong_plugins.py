"""A catalogue of small wrong plugins: one right plugin, and what was done to each of the others.

A defect shows at startup, or only at the request that triggers it: an image wider than 50 pixels
(`WIDE`), or a text that ends with `@` (`MARKED`). All are one-file plugins over mm-llava's model.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from wrong_startups import EDITS, STARTUP_STATEMENTS
from wrong_statements import STATEMENTS

ARCHITECTURE = "LlavaForConditionalGeneration"
MAX_RIGHT_WIDTH = 50  # pixels; images up to here are served rightly by plugins wrong at runtime

STARTUP, WIDE, MARKED = "startup", "wide", "marked"

RIGHT = """
import dataclasses
import time
from pathlib import Path

import torch
from mm_engine.plugins import PromptInputs, expand_placeholders, hookimpl, placeholder_token_id
from mm_llava.counts import num_image_tokens
from mm_llava.model import LlavaForConditionalGeneration
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

ARCHITECTURES = ["LlavaForConditionalGeneration"]


def hang():
    end = time.monotonic() + 120
    while not Path(__file__ + ".end").exists() and time.monotonic() < end:
        time.sleep(0.02)


class Model(LlavaForConditionalGeneration):
    def __init__(self, ctx):
        super().__init__(ctx)
        (self.marker,) = ctx.tokenizer.encode("@", add_special_tokens=False)
        # init

    def embed_images(self, *, pixel_values, width):
        rows = super().embed_images(pixel_values=pixel_values)
        # embed_images
        return rows

    def forward(self, input_ids, positions, attn_metadata, *, inputs_embeds=None):
        marked = input_ids == self.marker
        hidden = super().forward(input_ids, positions, attn_metadata, inputs_embeds=inputs_embeds)
        self.rows_after_marker = hidden[marked]
        # forward
        return hidden

    def compute_logits(self, hidden):
        marked = (hidden[:, None] == self.rows_after_marker[None]).all(-1).any(-1)
        logits = super().compute_logits(hidden)
        # compute_logits
        return logits

    def load_weights(self, weights):
        # load_weights
        return super().load_weights(weights)


@hookimpl
def model_class(ctx):
    # model_class
    return Model


@hookimpl
def max_tokens(ctx, modality):
    # max_tokens
    return num_image_tokens(ctx.hf_config)


@hookimpl
def register_input_mapper(ctx, register):
    # register_input_mapper
    processor = AutoImageProcessor.from_pretrained(ctx.checkpoint)

    def to_tensors(ctx, image):
        wide = image.width > 50
        # to_tensors
        pixels = processor(images=image, return_tensors="pt")["pixel_values"][0]
        tensors = {"pixel_values": pixels, "width": torch.tensor([image.width])}
        # tensors
        return tensors

    register("image", to_tensors)


@hookimpl
def input_processor(ctx, inputs):
    images = inputs.multi_modal_data["image"]
    wide = any(image.width > 50 for image in images)
    counts = [num_image_tokens(ctx.hf_config) for image in images]
    # input_processor
    return expand_placeholders(inputs, placeholder_token_id(ctx), counts)


@hookimpl
def dummy_data(ctx, seq_len, counts):
    images = tuple(Image.new("RGB", (48, 48)) for _ in range(counts.get("image", 0)))
    ids = (placeholder_token_id(ctx),) * len(images)
    text = ctx.tokenizer.encode("a", add_special_tokens=False)[:1]
    num_text = 1 + seq_len - len(images) * num_image_tokens(ctx.hf_config)
    # dummy_data
    return PromptInputs(
        prompt_token_ids=(*ids, *text * max(1, num_text)), multi_modal_data={"image": images}
    )


@hookimpl
def placeholder_text(ctx, modality, index):
    # placeholder_text
    return ctx.tokenizer.convert_ids_to_tokens(placeholder_token_id(ctx))
"""


@dataclass(frozen=True)
class WrongPlugin:
    """One defect: `source` is the whole plugin, `fact` a regex of what the message says of it.

    `hook` is what the engine blames; `cause` the hook that is wrong in truth, where the engine
    sees two that disagree and can't know which of them is right. Both are the empty string where
    the plugin can't even be imported.
    """

    name: str
    source: str
    hook: str
    fact: str
    when: str  # STARTUP, WIDE or MARKED: when it shows
    cause: str

    def write(self, folder: Path) -> Path:
        """The plugin as a file in `folder`."""
        file = folder / f"{self.name.replace('-', '_')}.py"
        file.write_text(self.source)
        return file


def end_hanging(file: Path) -> None:
    """Let go what hangs in the hooks of the plugin in `file`, for two minutes otherwise.

    So a test whose error came before this call has seen that nobody waited for the hook, without
    a look at the clock.
    """
    Path(f"{file}.end").touch()


def edited(*edits: tuple[str, str]) -> str:
    """The right plugin's source with each `old` replaced, which must be there once."""
    source = RIGHT
    for old, new in edits:
        if source.count(old) != 1:
            raise ValueError(f"not there once: {old!r}")
        source = source.replace(old, new)
    return source


#: The hook that a mark in RIGHT belongs to, where it isn't called as the mark is.
HOOKS = {"to_tensors": "register_input_mapper", "tensors": "register_input_mapper"}
#: What `WRONG` stands for in a statement at a mark: whether this item, or this row, goes wrong.
CONDITIONS = {
    "input_processor": {STARTUP: "True", WIDE: "wide"},
    "to_tensors": {STARTUP: "True", WIDE: "wide"},
    "tensors": {STARTUP: "True", WIDE: "wide"},
    "embed_images": {STARTUP: "True", WIDE: "w > 50"},
    "forward": {STARTUP: "(marked | True)", MARKED: "marked"},
    "compute_logits": {STARTUP: "(marked | True)", MARKED: "marked"},
}


def _with_statement(mark: str, statement: str) -> str:
    (indent,) = re.findall(rf"^( *)# {mark}$", RIGHT, re.MULTILINE)
    return edited((f"{indent}# {mark}\n", textwrap.indent(statement, indent) + "\n"))


def _blocks(text: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Yield section, name, the hook blamed instead of the section's or "", the lines, the fact."""
    section = ""
    for block in re.split(r"\n{2,}", text.strip()):
        if block.startswith("["):
            section = block.strip("[]")
            continue
        first, _, rest = block.partition("\n")
        lines, _, fact = rest.rpartition("\n=> ")
        name, _, blamed = first.partition(" blames ")
        yield section, name, blamed, lines, fact


def _catalogue() -> Iterator[WrongPlugin]:
    for mark, name, blamed, statement, fact in _blocks(STATEMENTS + "\n" + STARTUP_STATEMENTS):
        cause = HOOKS.get(mark, mark)
        for when, condition in CONDITIONS.get(mark, {STARTUP: ""}).items():
            source = _with_statement(mark, statement.replace("WRONG", condition))
            full_name = name if when == STARTUP else f"{name}-when-{when}"
            yield WrongPlugin(full_name, source, blamed or cause, fact, when, cause)
    for cause, name, blamed, lines, fact in _blocks(EDITS):
        old, _, new = lines.partition("\n-->")
        source = edited((old, new.removeprefix(" ").removeprefix("\n")))
        yield WrongPlugin(name, source, blamed or cause, fact, STARTUP, cause)


#: Every wrong plugin by name.
WRONG_PLUGINS = {plugin.name: plugin for plugin in _catalogue()}


def wrong_at(*whens: str) -> list[str]:
    """The names of the plugins whose defect shows then."""
    return [name for name, plugin in WRONG_PLUGINS.items() if plugin.when in whens]
