"""The bundled demo: an ordinary checkpoint that answers as its card says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mm_engine import LLM, SamplingParams
from mm_engine.outputs import CompletionOutput
from mm_engine.plugins.discovery import default_model, demos
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

#: The picture shows a small black star, a small red cross and a large green ring.
QUESTIONS = {
    "What colour is the star?": "black",
    "What color is the star?": "black",
    "What colour is the cross?": "red",
    "What colour is the ring?": "green",
    "What shape is the black object?": "star",
    "What shape is the red object?": "cross",
    "What shape is the green object?": "ring",
    "How many objects are there?": "3",
    "How many red objects are there?": "1",
    "How many blue objects are there?": "0",
    "Describe the image.": "a small black star, a small red cross and a large green ring",
    "What do you see?": "a small black star, a small red cross and a large green ring",
}


@pytest.fixture(scope="module")
def path() -> Path:
    return demos()["llava-demo"]


@pytest.fixture(scope="module")
def answers(path: Path) -> dict[str, CompletionOutput]:
    """The engine's answers, all asked at once."""
    with Image.open(path / "example.png") as image:
        image.load()
        conversations = [messages(question, image) for question in QUESTIONS]
    llm = LLM(dtype="float32", progress=False)
    outputs = llm.chat(conversations, SamplingParams(temperature=0.0, max_tokens=40))
    assert llm.engine.stats().num_encodes == 1
    return {q: output.outputs[0] for q, output in zip(QUESTIONS, outputs, strict=True)}


def messages(question: str, image: Image.Image) -> list[dict[str, Any]]:
    parts = [{"type": "image", "image": image}, {"type": "text", "text": question}]
    return [{"role": "user", "content": parts}]


def test_demo_is_what_is_served_when_no_model_is_named(path: Path) -> None:
    assert default_model() == "llava-demo"
    assert (path / "config.json").is_file()
    assert path.parent.name == "mm_llava"


def test_demo_is_small_enough_to_bundle(path: Path) -> None:
    assert sum(file.stat().st_size for file in path.iterdir() if file.is_file()) < 6 * 2**20


def test_example_is_answered_as_the_card_says(answers: dict[str, CompletionOutput]) -> None:
    assert {question: answer.text.strip() for question, answer in answers.items()} == QUESTIONS
    assert {answer.finish_reason for answer in answers.values()} == {"stop"}


def test_transformers_loads_the_demo_and_gives_the_same_tokens(
    path: Path, answers: dict[str, CompletionOutput]
) -> None:
    processor = AutoProcessor.from_pretrained(path)
    model: Any = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32).eval()
    for question in ("Describe the image.", "What colour is the ring?"):
        with Image.open(path / "example.png") as image:
            inputs = processor.apply_chat_template(
                messages(question, image),
                add_generation_prompt=True,
                tokenize=True,
                return_dict=True,
                processor_kwargs={"return_tensors": "pt"},
            )
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=40, do_sample=False)
        answer = ids[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer == answers[question].token_ids
