"""The bundled demo: an ordinary checkpoint that transformers loads and answers alike."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from mm_engine import LLM, SamplingParams
from mm_engine.plugins.discovery import default_model, demos
from parity import Case, Oracle, picture
from PIL import Image
from transformers import AutoConfig

from mm_llava_next.counts import layout

NAME = "llava-next-demo"
QUESTIONS = ("Describe the image.", "How many objects are there?")
#: The example shows a small orange star, a large red cross and a small green ring.
ANSWERS = {
    "What colour is the star?": "orange",
    "What color is the cross?": "red",
    "What colour is the ring?": "green",
    "What shape is the orange object?": "star",
    "What shape is the red object?": "cross",
    "What shape is the green object?": "ring",
    "How many objects are there?": "3",
    "How many green objects are there?": "1",
    "How many blue objects are there?": "0",
    "Describe the image.": "a small orange star, a large red cross and a small green ring",
}
NUM_TOKENS = 24


@pytest.fixture(scope="module")
def path() -> Path:
    return demos()[NAME]


@pytest.fixture(scope="module")
def images(path: Path) -> list[Image.Image]:
    """The demo's own picture, and what it becomes when it is stretched, cut or replaced."""
    with Image.open(path / "example.png") as opened:
        example = opened.convert("RGB")
    return [
        example,
        example.resize((600, 150)),
        example.resize((90, 1500)),
        example.crop((0, 0, 40, example.height)),
        picture(0, 1, 1),
    ]


def test_it_is_found_and_is_not_the_default(path: Path) -> None:
    assert (path / "config.json").is_file()
    assert path.parent.name == "mm_llava_next"
    assert default_model() == "llava-demo"


def test_it_is_small_enough_to_bundle(path: Path) -> None:
    assert sum(file.stat().st_size for file in path.iterdir() if file.is_file()) < 6 * 2**20


def test_transformers_gives_the_same_tokens(path: Path, images: list[Image.Image]) -> None:
    llm = LLM(NAME, dtype="float32", progress=False)
    oracle = Oracle(path)
    params = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    cases = []
    for image in images:
        for question in QUESTIONS:
            parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
            message = {"role": "user", "content": parts}
            rendered = oracle.tokenizer.apply_chat_template(
                [message], add_generation_prompt=True, tokenize=False
            )
            bos = oracle.tokenizer.bos_token or ""
            cases.append(Case(rendered.removeprefix(bos), (image,)))
    outputs = llm.generate([case.as_prompt() for case in cases], params)
    for case, output in zip(cases, outputs, strict=True):
        assert output.prompt_token_ids == oracle.expanded_ids(case)
        oracle.check(case, oracle.answer(case, NUM_TOKENS), output.outputs[0].token_ids)
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > len(QUESTIONS)


def test_the_example_is_answered_rightly(images: list[Image.Image]) -> None:
    llm = LLM(NAME, progress=False)
    conversations = [
        [
            {
                "role": "user",
                "content": [
                    {"type": "image", "image": images[0]},
                    {"type": "text", "text": question},
                ],
            }
        ]
        for question in ANSWERS
    ]
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=40))
    answers = {
        q: output.outputs[0].text.strip() for q, output in zip(ANSWERS, outputs, strict=True)
    }
    assert answers == ANSWERS


def test_the_card_says_how_many_tokens_a_picture_takes(path: Path) -> None:
    """Rows of its table: `| 400 × 300 | 2 × 2 | 594 |`."""
    card = (path / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) × (\d+) \| (\d+) × (\d+) \| (\d+) \|$", card, re.M)
    assert len(rows) > 5
    config = AutoConfig.from_pretrained(path)
    for width, height, num_rows, num_columns, num_tokens in (map(int, row) for row in rows):
        place = layout(config, height, width)
        assert (place.rows, place.columns) == (num_rows, num_columns)
        assert place.num_tokens == num_tokens
