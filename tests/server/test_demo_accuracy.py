"""The demo over HTTP: 1,000 questions, eight clients at once, held to truth and to transformers."""

from __future__ import annotations

import importlib.util
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from openai import OpenAI
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mm_engine.engine.detokenizer import token_text
from mm_engine.plugins.discovery import demos
from pictures import data_url, encode
from serving import ServerProcess

NUM_QUESTIONS = 1000
NUM_CLIENTS = 8
MIN_ACCURACY = 0.95
MAX_TOKENS = 48
FIRST_SEED = 3_000_000_000  # training stays below 1_000_000_000 and refuses the others


def _painter() -> Any:
    """The script that drew the training pictures."""
    path = Path(__file__).parents[2] / "training" / "pictures.py"
    spec = importlib.util.spec_from_file_location("painter", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["painter"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True)
class Question:
    """One question about one picture, and the truth."""

    image: Image.Image
    text: str
    truth: str
    kind: str


@pytest.fixture(scope="module")
def asked() -> list[Question]:
    painter = _painter()
    found: list[Question] = []
    seed = FIRST_SEED
    while len(found) < NUM_QUESTIONS:
        rng = painter.evaluation_rng(seed)
        scene = painter.random_scene(rng)
        image = painter.draw(scene, 96, 96)
        all_of_it = painter.questions(scene, rng)
        for i in rng.permutation(len(all_of_it))[:3]:
            text, truth, kind = all_of_it[i]
            found.append(Question(image, text, truth, kind))
        seed += 1
    return found[:NUM_QUESTIONS]


def answers_of_transformers(asked: Sequence[Question]) -> list[list[int]]:
    """Greedy ids up to and with the end of sequence, in float32."""
    checkpoint = min(demos().items())[1]
    processor = AutoProcessor.from_pretrained(checkpoint)
    model: Any = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    by_length: dict[int, list[tuple[int, Any]]] = defaultdict(list)
    for i, question in enumerate(asked):
        content = [
            {"type": "image", "image": question.image},
            {"type": "text", "text": question.text},
        ]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            processor_kwargs={"return_tensors": "pt"},
        )
        by_length[inputs["input_ids"].shape[1]].append((i, inputs))
    answers: list[list[int]] = [[] for _ in asked]
    for length, group in by_length.items():  # of one length: nothing is padded
        for start in range(0, len(group), 50):
            part = group[start : start + 50]
            with torch.inference_mode():
                ids = model.eval().generate(
                    input_ids=torch.cat([inputs["input_ids"] for _, inputs in part]),
                    attention_mask=torch.cat([inputs["attention_mask"] for _, inputs in part]),
                    pixel_values=torch.cat([inputs["pixel_values"] for _, inputs in part]),
                    max_new_tokens=MAX_TOKENS,
                    do_sample=False,
                )
            end = model.generation_config.eos_token_id
            end = end[0] if isinstance(end, list) else end
            for (i, _), row in zip(part, ids[:, length:].tolist(), strict=True):
                answers[i] = row[: row.index(end) + 1] if end in row else row
    return answers


def test_a_thousand_questions_over_http(
    server: ServerProcess,
    asked: list[Question],
    record_property: Callable[[str, object], None],
) -> None:
    def ask(client: OpenAI, question: Question) -> tuple[str, list[str]]:
        content: Any = [
            {"type": "image_url", "image_url": {"url": data_url(encode(question.image))}},
            {"type": "text", "text": question.text},
        ]
        response = client.chat.completions.create(
            model="demo",
            messages=[{"role": "user", "content": content}],
            temperature=0,
            max_tokens=MAX_TOKENS,
            logprobs=True,
        )
        choice = response.choices[0]
        assert choice.finish_reason == "stop"
        assert choice.logprobs is not None and choice.logprobs.content is not None
        return choice.message.content or "", [entry.token for entry in choice.logprobs.content]

    with server.client() as client, ThreadPoolExecutor(NUM_CLIENTS) as pool:
        answers = list(pool.map(lambda question: ask(client, question), asked))

    right = sum(text == question.truth for (text, _), question in zip(answers, asked, strict=True))
    record_property("exact_answers", right)
    assert right / NUM_QUESTIONS >= MIN_ACCURACY, f"{right} of {NUM_QUESTIONS}"
    assert len({question.kind for question in asked}) == 6

    processor = AutoProcessor.from_pretrained(min(demos().items())[1])
    for ids, (text, tokens), question in zip(
        answers_of_transformers(asked), answers, asked, strict=True
    ):
        expected = [token_text(processor.tokenizer, token) for token in ids]
        assert tokens == expected, question.text
        assert text == processor.tokenizer.decode(ids, skip_special_tokens=True)
