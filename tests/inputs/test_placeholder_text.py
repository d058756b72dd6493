"""What a plugin wants around an image stands in the prompt, whichever way the template is made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from transformers import AddedToken

from checkpoints import CHAT_TEMPLATE, SPECIAL, make_tokenizer
from mm_engine.inputs.pipeline import InputPipeline

IMAGE_ID = SPECIAL.index("<image>")
PLUGIN = """
from mm_engine.plugins import hookimpl
from mm_llava.plugin import max_tokens, model_class

@hookimpl
def placeholder_text(ctx, modality, index):
    return f"Picture {index + 1}: <img><image></img>"
"""
STRINGS_ONLY = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}\n{% endfor %}"
WRAPPED = CHAT_TEMPLATE.replace("<image>", "Picture 1: <img><image></img>")


@pytest.fixture
def open_wrapped(
    open_with: Callable[..., InputPipeline], copy: Path, tmp_path: Path
) -> Callable[[str], InputPipeline]:
    """`open_wrapped(template)`: the checkpoint with a plugin that wraps images in two tokens."""
    file = tmp_path / "wrapping.py"
    file.write_text(PLUGIN)
    tokenizer = make_tokenizer()
    tokens = [AddedToken(token, special=True) for token in ("<img>", "</img>")]
    tokenizer.add_tokens(tokens, special_tokens=True)
    config = json.loads((copy / "config.json").read_text())
    config["text_config"]["vocab_size"] = len(tokenizer)
    (copy / "config.json").write_text(json.dumps(config))
    return lambda template: open_with(tokenizer, chat_template=template, plugins=(str(file),))


def messages(*texts: str) -> list[dict[str, Any]]:
    """A turn for each text, with an image before it."""
    picture = Image.new("RGB", (8, 8))
    return [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}],
        }
        for text in texts
    ]


def test_image_token_that_a_template_writes_is_completed(
    open_wrapped: Callable[[str], InputPipeline],
) -> None:
    pipeline = open_wrapped(CHAT_TEMPLATE)
    prepared = pipeline.prepare_chat(messages("hello", "and this?"))
    assert prepared.prompt == (
        "<s>USER: Picture 1: <img><image></img>\nhello "
        "USER: Picture 2: <img><image></img>\nand this? ASSISTANT:"
    )
    before = pipeline.ctx.tokenizer.convert_tokens_to_ids("<img>")
    for item in prepared.items:
        place = item.placeholder
        assert prepared.prompt_token_ids[place.offset - 1] == before
        assert set(prepared.prompt_token_ids[place.offset : place.end]) == {IMAGE_ID}


def test_template_of_strings_gets_each_images_own_text(
    open_wrapped: Callable[[str], InputPipeline],
) -> None:
    rendered, _ = open_wrapped(STRINGS_ONLY).chat.encode(messages("hello", "and this?"))
    assert rendered == (
        "user: Picture 1: <img><image></img>\nhello\n"
        "user: Picture 2: <img><image></img>\nand this?\n"
    )


def test_template_that_writes_all_of_it_is_left_alone(
    open_wrapped: Callable[[str], InputPipeline],
) -> None:
    rendered, _ = open_wrapped(WRAPPED).chat.encode(messages("hello"))
    assert rendered == "<s>USER: Picture 1: <img><image></img>\nhello ASSISTANT:"


@pytest.mark.parametrize("typed", ["a <image> b", "<img><image></img>", "ends with <ima", "</img>"])
def test_what_a_user_types_is_not_completed(
    open_wrapped: Callable[[str], InputPipeline], typed: str
) -> None:
    pipeline = open_wrapped(CHAT_TEMPLATE)
    prepared = pipeline.prepare_chat(messages(typed))
    assert prepared.prompt == f"<s>USER: Picture 1: <img><image></img>\n{typed} ASSISTANT:"
    assert [len(prepared.items), prepared.prompt_token_ids.count(IMAGE_ID)] == [
        1,
        prepared.items[0].placeholder.length,
    ]


def test_template_that_cuts_a_mark_in_half_still_gets_its_image(
    open_wrapped: Callable[[str], InputPipeline],
) -> None:
    cutting = (
        "{% set p = messages[0]['content'] %}{{ p[1]['text'][:6] }}|"
        "{% if p[0]['type'] == 'image' %}<image>{% endif %}|{{ p[1]['text'] }}"
    )
    rendered, _ = open_wrapped(cutting).chat.encode(messages("x <image> y"))
    assert rendered == "x <im|Picture 1: <img><image></img>|x <image> y"
