"""The bundled demo: an ordinary checkpoint that transformers loads and answers alike."""

from __future__ import annotations

from pathlib import Path

import pytest
from mm_engine import LLM, SamplingParams
from mm_engine.plugins.discovery import default_model, demos
from parity import Case, Oracle, picture
from PIL import Image

NAME = "llava-next-demo"
QUESTIONS = ("Describe the image.", "How many objects are there?")
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
