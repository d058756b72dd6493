"""Models that put text among an image's rows (separators, labels) are checked like the others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mm_engine.testing import CheckReport
from mm_engine.testing.registry import CHECKS

CheckSource = Callable[..., CheckReport]

#: LLaVA-1.5 with a label before each image's rows and a separator after each row of its grid.
RIGHT = """
import dataclasses

import torch
from mm_engine.plugins import (
    PlaceholderRange, RequestError, dummy_prompt, hookimpl, image_processor, placeholder_token_id
)
from mm_llava.counts import num_image_tokens
from mm_llava.model import LlavaForConditionalGeneration

LABEL = "Picture:"


def ids_of(ctx, num_rows):
    token = placeholder_token_id(ctx)
    side = round(num_rows**0.5)
    label, stop = (ctx.tokenizer.encode(t, add_special_tokens=False) for t in (LABEL, ";"))
    return [*label, *(([token] * side + stop) * side)]


class Model(LlavaForConditionalGeneration):
    def __init__(self, ctx):
        super().__init__(ctx)
        self.token = placeholder_token_id(ctx)

    def embed_images(self, *, pixel_values, image_ids):
        features = super().embed_images(pixel_values=pixel_values)
        done = []
        for ids, rows in zip(image_ids, features, strict=True):
            embedded = self.embed_tokens(ids).clone()
            embedded[ids == self.token] = rows
            done.append(embedded)
        return done


@hookimpl
def model_class(ctx):
    return Model


@hookimpl
def register_input_mapper(ctx, register):
    register("image", to_tensors)


def to_tensors(ctx, image):
    pixels = image_processor(ctx)(images=image, return_tensors="pt")["pixel_values"][0]
    ids = ids_of(ctx, num_image_tokens(ctx.hf_config))
    return {"pixel_values": pixels, "image_ids": torch.tensor(ids)}


@hookimpl
def max_tokens(ctx, modality):
    return len(ids_of(ctx, num_image_tokens(ctx.hf_config)))


@hookimpl
def input_processor(ctx, inputs):
    token, items = placeholder_token_id(ctx), inputs.mapped["image"]
    given = inputs.prompt_token_ids
    if given.count(token) != len(items):
        raise RequestError("Put one placeholder for each image.", param="prompt")
    ids, ranges = [], []
    for one in given:
        if one != token:
            ids.append(one)
            continue
        expanded = items[len(ranges)]["image_ids"].tolist()
        ranges.append(PlaceholderRange("image", len(ranges), len(ids), len(expanded)))
        ids += expanded
    return dataclasses.replace(inputs, prompt_token_ids=tuple(ids), placeholders=tuple(ranges))


@hookimpl
def dummy_data(ctx, seq_len, counts):
    return dummy_prompt(ctx, seq_len, counts, lambda m: max_tokens(ctx, m), size=(40, 40))
"""

#: What was done, and the check and the hook that must be named.
WRONG = {
    "text rows of zeros": (
        ("embedded = self.embed_tokens(ids).clone()", "embedded = self.embed_tokens(ids) * 0"),
        "parity-image-rows",
        "embed_images",
        "embeddings of the text among an image's rows",
    ),
    "rows of the image reversed": (
        ("embedded[ids == self.token] = rows", "embedded[ids == self.token] = rows.flip(0)"),
        "parity-image-rows",
        "embed_images",
        "rows of get_image_features",
    ),
    "one placeholder too few": (
        ("* side)]", "* side)][:-2]"),
        "counts",
        "embed_images",
        "no exception",
    ),
    "an image's row left out, count and model alike": (
        (
            "embedded[ids == self.token] = rows",
            "embedded[ids == self.token] = rows[: int((ids == self.token).sum())]",
        ),
        "counts",
        "input_processor and embed_images",
        "rows for an image of 1x1 pixels, the smallest found (at 25 of 25 sizes tried), as "
        "transformers makes them with the 7 text tokens that stand among them",
    ),
    "max_tokens without the text": (
        (
            "return len(ids_of(ctx, num_image_tokens(ctx.hf_config)))",
            "return num_image_tokens(ctx.hf_config)",
        ),
        "max-tokens",
        "max_tokens",
        "at least 24",
    ),
}


def test_right_plugin_passes_every_check(check_source: CheckSource) -> None:
    report = check_source(RIGHT)
    assert [result.name for result in report.results if result.status != "passed"] == []
    assert len(report.results) == len(CHECKS)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_one_is_found(name: str, check_source: CheckSource) -> None:
    (old, new), check, hook, expected = WRONG[name]
    source = RIGHT.replace(old, new)
    assert source != RIGHT
    if name == "an image's row left out, count and model alike":
        source = source.replace("* side)]", "* (side - 1))]")
    report = check_source(source, check)
    (failure,) = report.failures
    assert (failure.name, failure.hook) == (check, hook)
    assert expected in (failure.expected or "")


def test_token_of_its_own_for_an_images_rows_is_no_text(
    check_source: CheckSource, llava: Path
) -> None:
    """Then nothing tells text from rows: lengths are compared, as ever."""
    source = RIGHT.replace("token = placeholder_token_id(ctx)\n    side", "token = 7\n    side")
    source = source.replace("self.token = placeholder_token_id(ctx)", "self.token = 7")
    source = source.replace("[*label, *(([token] * side + stop) * side)]", "[token] * num_rows")
    report = check_source(source, "counts", "parity-image-rows")
    assert report.failures == ()
