"""`LLM` called with things of the wrong kind: one clear error, and the engine goes on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mm_engine import LLM, SamplingParams
from mm_engine.errors import MMEngineError, RequestError, StartupError
from mm_engine.outputs import RequestOutput
from mm_engine.sequence import ScheduledBatch
from parity import picture

GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def shared(llava: Path) -> LLM:
    # 8 blocks of 16: a prompt may be shorter than the model's length and still not fit.
    block = 16 * 2 * 2 * 16 * 2 * 4
    return LLM(str(llava), dtype="float32", kv_cache_memory=8 * block, progress=False)


@pytest.fixture
def llm(shared: LLM) -> Iterator[LLM]:
    """Whatever a test does, nothing is left behind, and the next answer is as before."""
    yield shared
    stats = shared.engine.stats()
    assert stats.num_used_blocks == stats.num_running == stats.num_waiting == 0
    assert not shared.engine.has_work
    assert len(answer(shared.generate("Hello", GREEDY)[0])) == 4


def answer(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


@pytest.mark.parametrize("make", [tuple, np.array, torch.tensor], ids=["tuple", "array", "tensor"])
def test_ids_may_come_as_any_sequence(llm: LLM, make: Any) -> None:
    ids = [1, 40, 41]
    expected = answer(llm.generate({"prompt_token_ids": ids}, GREEDY)[0])
    assert answer(llm.generate({"prompt_token_ids": make(ids)}, GREEDY)[0]) == expected


def test_one_id_may_come_as_an_array_without_dimensions(llm: LLM) -> None:
    expected = answer(llm.generate({"prompt_token_ids": [40]}, GREEDY)[0])
    assert answer(llm.generate({"prompt_token_ids": np.array(40)}, GREEDY)[0]) == expected


@pytest.mark.parametrize(
    ("prompt", "match"),
    [
        (3, "a prompt must be a str"),
        ([1, 40, 41], "a prompt must be a str"),
        (None, "a prompt must be a str"),
        ({"prompt": 3}, "the prompt is not a text: int"),
        ({"prompt_token_ids": 3.5}, "must be integers"),
        ({"prompt_token_ids": [[1]]}, "must be integers"),
        ({"prompt_token_ids": []}, "the prompt is empty"),
        ({"prompt": "<image>", "multi_modal_data": [1]}, "multi_modal_data as a dict"),
        ({"prompt": "<image>", "multi_modal_data": {"image": 3}}, "not a PIL image: int"),
        ({"prompt": "<image>", "multi_modal_data": {"image": np.zeros(3)}}, "not a PIL image"),
        ({"prompt": "<image>", "multi_modal_data": {"image": None}}, "1 placeholder for 0 images"),
    ],
    ids=str,
)
def test_prompts_of_the_wrong_kind_are_refused(llm: LLM, prompt: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match):
        llm.generate(["Hello", prompt], GREEDY)


@pytest.mark.parametrize(
    "messages",
    [
        "hello",
        {"role": "user", "content": "hello"},
        ["hello"],
        [["hello"]],
        [[{"role": "user", "content": "hello"}], "hello"],
        [{"role": "user", "content": "hello"}, 3],
        [[3]],
    ],
    ids=str,
)
def test_messages_of_the_wrong_kind_are_refused(llm: LLM, messages: Any) -> None:
    with pytest.raises(RequestError, match="messages? must be a") as caught:
        llm.chat(messages, GREEDY)
    assert (caught.value.param or "").startswith("messages")


@pytest.mark.parametrize(
    ("priority", "match"),
    [
        ([1], "priority doesn't match the prompts: 1 for 2"),
        ([1, 2, 3], "priority doesn't match the prompts: 3 for 2"),
        ([1, "2"], "priority must hold integers"),
        ([1, 2.0], "priority must hold integers"),
        (5, "priority must hold integers"),
    ],
    ids=str,
)
def test_priorities_of_the_wrong_kind_are_refused(llm: LLM, priority: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        llm.generate(["Hello", "Bye"], GREEDY, priority=priority)
    assert caught.value.param == "priority"


def test_the_prompt_of_the_lowest_priority_number_is_answered_first(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, ended = llm.engine.step, []

    def watched() -> list[RequestOutput]:
        outputs = step()
        ended.extend(output.request_id for output in outputs if output.finished)
        return outputs

    monkeypatch.setattr(llm.engine, "step", watched)
    monkeypatch.setattr(llm.engine.scheduler, "max_num_seqs", 1)
    answers = llm.generate(["a", "b", "c"], GREEDY, priority=[2, 0, 1])
    ids = [answer.request_id for answer in answers]
    assert ended == [ids[1], ids[2], ids[0]]


def test_a_request_that_the_pool_can_not_hold_runs_none_of_its_neighbours(llm: LLM) -> None:
    before = llm.engine.stats().num_prompt_tokens
    with pytest.raises(RequestError, match="too long: 200 tokens"):
        llm.generate(["Hello", {"prompt_token_ids": [40] * 200}], GREEDY)
    assert llm.engine.stats().num_prompt_tokens == before


@pytest.mark.parametrize("num_steps", [1, 3])
def test_an_interrupt_leaves_nothing_running(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    """Ctrl-C in the middle of a step, in which an image was to be encoded or not."""
    prompts: list[Any] = [
        {"prompt": "<image>", "multi_modal_data": {"image": picture(7 + num_steps)}},
        "there",
    ]
    runner: Any = llm.engine.runner
    launch, seen = runner.launch, 0

    def interrupted(batch: ScheduledBatch) -> Any:
        nonlocal seen
        seen += 1
        if seen == num_steps:
            raise KeyboardInterrupt
        return launch(batch)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "launch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompts, GREEDY)
    assert llm.engine.stats().num_used_blocks == 0
    for output in llm.generate(prompts, GREEDY):
        assert output.error is None
        assert len(answer(output)) == 4


def test_a_request_that_the_engine_refuses_takes_its_neighbours_along(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llm.pipeline, "max_len", 512)  # as if the pool were larger than it is
    with pytest.raises(RequestError, match="exceed the KV cache"):
        llm.generate(["Hello", {"prompt_token_ids": [40] * 200}], GREEDY)


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_pictures_of_any_mode_are_answered_as_their_rgb(llm: LLM, mode: str) -> None:
    gradient = np.arange(32 * 40, dtype=np.uint16).reshape(32, 40)
    image = (
        Image.fromarray(gradient * 50)
        if mode == "I;16"
        else Image.fromarray((gradient // 6).astype(np.uint8)).convert("RGB").convert(mode)
    )
    assert image.mode == mode
    if mode == "I;16":
        rgb = Image.fromarray((gradient * 50 >> 8).astype(np.uint8)).convert("RGB")
    else:
        rgb = image.convert("RGB")
    outputs = llm.generate(
        [{"prompt": "<image>", "multi_modal_data": {"image": i}} for i in (image, rgb)], GREEDY
    )
    assert answer(outputs[0]) == answer(outputs[1])


@pytest.mark.parametrize(
    "options",
    [
        {"max_num_batched_tokens": 0},
        {"max_num_seqs": 0},
        {"block_size": 0},
        {"kv_cache_memory": 1},
        {"max_model_len": 10**6},
        {"device": "tpu"},
        {"dtype": "int4"},
        {"attention_backend": "magic"},
        {"load_format": "pickle"},
        {"chat_template": "{% if %}"},
        {"chat_template": "/no/such/file.jinja"},
        {"plugins": ("LlavaForConditionalGeneration=mm-other",)},
    ],
    ids=str,
)
def test_options_that_can_not_be_are_one_sentence(llava: Path, options: dict[str, Any]) -> None:
    with pytest.raises(StartupError) as caught:
        LLM(str(llava), progress=False, **options)
    message = str(caught.value)
    assert "\n" not in message
    assert isinstance(caught.value, MMEngineError)
    assert str(next(iter(options.values())))[:7].strip("('") in message or "Jinja" in message
