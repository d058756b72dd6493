"""A template that cuts a message's text in the middle of a mark."""

from __future__ import annotations

import pytest

from mm_engine.config import EngineConfig
from mm_engine.inputs.chat import ChatRenderer
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.plugins.discovery import demos
from mm_engine.worker.loader import open_model


@pytest.fixture(scope="module")
def pipeline() -> InputPipeline:
    return InputPipeline(open_model(EngineConfig(model=min(demos()))))


def test_the_templates_own_tokens_stay_tokens(pipeline: InputPipeline) -> None:
    template = (
        "{{ bos_token }}{% for m in messages %}<image>{{ m['content'].split('</s>')[-1] }}"
        "{% endfor %}"
    )
    renderer = ChatRenderer(pipeline.ctx, template, lambda index: "<image>")
    text, ids = renderer.encode([{"role": "user", "content": "a</s>b"}])
    assert text == "<s><image>b"
    tokenizer = pipeline.ctx.tokenizer
    assert list(ids) == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_without_images_a_model_may_be_shorter_than_one(pipeline: InputPipeline) -> None:
    config = EngineConfig(model=min(demos()), max_model_len=20, limit_mm_per_prompt={"image": 0})
    request = InputPipeline(open_model(config)).dummy_request()
    assert len(request.prompt_token_ids) == 16
