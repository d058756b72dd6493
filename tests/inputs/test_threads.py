"""The server prepares prompts in several threads: one must not change what another makes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from mm_engine.config import EngineConfig
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.plugins.discovery import demos
from mm_engine.worker.loader import open_model
from pictures import quarters


def test_special_tokens_in_a_text_leave_other_threads_prompts_alone() -> None:
    pipeline = InputPipeline(open_model(EngineConfig(model=min(demos()))))
    image = {"type": "image", "image": quarters()}
    with_image = [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]
    with_tokens = [{"role": "user", "content": "<image> </s> <s> " * 20}]

    def prepare(messages: list[dict[str, Any]]) -> tuple[int, ...]:
        return pipeline.prepare_chat(messages).prompt_token_ids

    alone = {prepare(with_image), prepare(with_tokens)}
    with ThreadPoolExecutor(4) as pool:
        together = set(pool.map(prepare, [with_image, with_tokens] * 200))
    assert together == alone
