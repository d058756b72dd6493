"""What was computed once serves again: counted in tokens, images and steps, never in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from checkpoints import make_llava
from mm_engine import LLM, SamplingParams
from mm_engine.outputs import RequestOutput
from mm_engine.plugins import defaults
from mm_engine.request import PromptInputs
from parity import Trace, picture

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
FIRST, SECOND = picture(1), picture(2)
BLOCK_SIZE = 4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("checkpoint"))


def start(checkpoint: Path, **options: Any) -> LLM:
    given = {"dtype": "float32", "block_size": BLOCK_SIZE, "progress": False, **options}
    return LLM(str(checkpoint), **given)


def uncached(checkpoint: Path) -> LLM:
    return start(checkpoint, enable_prefix_caching=False, mm_processor_cache_memory=0)


def num_encoded(llm: LLM) -> int:
    """Images that the tower has really seen."""
    encoded: int = llm.engine.runner._runner.encoder.num_encoded  # type: ignore[attr-defined]
    return encoded


def ask(llm: LLM, image: Image.Image, question: str = "What is it?", salt: str = "") -> Any:
    prompt = {
        "prompt": f"USER: <image>\n{question} ASSISTANT:",
        "multi_modal_data": {"image": image},
        "cache_salt": salt,
    }
    (output,) = llm.generate([prompt], GREEDY)
    assert output.error is None
    return output


def tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


def test_second_question_about_an_image_needs_neither_mapper_nor_tower(checkpoint: Path) -> None:
    llm, other = start(checkpoint), uncached(checkpoint)
    ask(llm, FIRST)
    encoded, trace = num_encoded(llm), Trace.of(llm)
    answer = ask(llm, FIRST.copy(), "How many are there?")
    assert tokens(answer) == tokens(ask(other, FIRST, "How many are there?"))
    assert num_encoded(llm) == encoded
    assert llm.pipeline.processed.num_hits == 1
    num_prompt = len(answer.prompt_token_ids)
    assert trace.steps[0].num_tokens == num_prompt - answer.num_cached_tokens < num_prompt // 2


@pytest.mark.parametrize("order", [(FIRST, SECOND, FIRST), (SECOND, FIRST, SECOND)])
def test_same_text_with_another_image_is_answered_for_that_image(
    checkpoint: Path, order: tuple[Image.Image, ...]
) -> None:
    llm, other = start(checkpoint), uncached(checkpoint)
    answers = [ask(llm, image) for image in order]
    wanted = [ask(other, image) for image in order]
    assert [tokens(answer) for answer in answers] == [tokens(answer) for answer in wanted]
    assert tokens(answers[0]) != tokens(answers[1])
    text_before = llm.pipeline.ctx.tokenizer("USER: <image>")["input_ids"][:-1]
    shared = len(text_before) // BLOCK_SIZE * BLOCK_SIZE
    assert answers[1].num_cached_tokens == shared, "the text before the image, and no more"
    assert answers[2].num_cached_tokens > shared + 16
    assert num_encoded(llm) - num_encoded(start(checkpoint)) == 2


def test_both_images_at_once_are_answered_each_for_its_own(checkpoint: Path) -> None:
    llm, other = start(checkpoint), uncached(checkpoint)
    images = [FIRST, SECOND, FIRST, FIRST, SECOND]
    prompts: list[Any] = [
        {"prompt": "<image> What is it?", "multi_modal_data": {"image": image}} for image in images
    ]
    encoded = num_encoded(llm)
    outputs = llm.generate(prompts, GREEDY)
    wanted = [other.generate([prompt], GREEDY)[0] for prompt in prompts]
    assert [tokens(output) for output in outputs] == [tokens(output) for output in wanted]
    assert num_encoded(llm) - encoded == 2
    assert sum(output.num_cached_tokens > 0 for output in outputs) == 3


def variants() -> dict[str, tuple[Image.Image, str]]:
    width, height = FIRST.size
    pixels = FIRST.tobytes()
    return {
        "another shape": (Image.frombytes("RGB", (height, width), pixels), ""),
        "another mode": (Image.frombytes("L", (width * 3, height), pixels), ""),
        "another salt": (FIRST, "mine"),
    }


@pytest.mark.parametrize("name", ["another shape", "another mode", "another salt"])
def test_same_bytes_are_not_the_same_image(checkpoint: Path, name: str) -> None:
    llm = start(checkpoint)
    ask(llm, FIRST)
    encoded, mapped = num_encoded(llm), llm.pipeline.processed.num_hits
    image, salt = variants()[name]
    answer = ask(llm, image, salt=salt)
    assert num_encoded(llm) == encoded + 1
    assert llm.pipeline.processed.num_hits == mapped
    assert answer.num_cached_tokens <= (0 if salt else 2 * BLOCK_SIZE)
    again = ask(llm, image, salt=salt)  # the positive control
    assert again.num_cached_tokens > 16
    assert tokens(again) == tokens(answer)
    assert num_encoded(llm) == encoded + 1


def keys_of(checkpoint: Path, **options: Any) -> tuple[str, set[bytes]]:
    """Content key of the first image, and the keys of the blocks that a question leaves."""
    defaults.image_processor.cache_clear()  # each of them is read once in a process
    defaults.mapper_options.cache_clear()
    llm = start(checkpoint, **options)
    ask(llm, FIRST)
    prepared = llm.pipeline.prepare(
        PromptInputs(prompt="<image>", multi_modal_data={"image": (FIRST,)})
    )
    return prepared.items[0].content_key, set(llm.engine.kv_cache._block_of_key)


PLUGIN = """
from mm_engine.plugins import hookimpl
from mm_engine.plugins.defaults import map_image
from mm_llava.plugin import max_tokens, model_class

@hookimpl
def register_input_mapper(ctx, register):
    register("image", mine)

def mine(ctx, image):
    return map_image(ctx, image)

# {version}
"""


def test_other_mapper_options_or_another_plugin_version_share_nothing(
    checkpoint: Path, tmp_path: Path
) -> None:
    options = checkpoint / "preprocessor_config.json"
    key, blocks = keys_of(checkpoint)
    assert keys_of(checkpoint) == (key, blocks)  # the positive control
    before = options.read_text()
    try:
        options.write_text(before.replace('"do_normalize": true', '"do_normalize": false'))
        assert options.read_text() != before
        other_key, other_blocks = keys_of(checkpoint)
    finally:
        options.write_text(before)
    assert other_key != key
    assert len(other_blocks & blocks) <= 2, "text before the image at most"

    for version in ("1", "2"):
        file = tmp_path / f"v{version}.py"
        file.write_text(PLUGIN.format(version=version))
        version_key, version_blocks = keys_of(checkpoint, plugins=(str(file),))
        assert version_key != key
        assert not version_blocks & blocks
        key, blocks = version_key, version_blocks


def test_chat_of_ten_turns_about_one_image_computes_only_the_new_turns(checkpoint: Path) -> None:
    llm, other = start(checkpoint), uncached(checkpoint)
    encoded = num_encoded(llm)
    messages: list[Any] = []
    known: list[int] = []  # ids of which the keys and values are there: all but the last one
    for turn in range(10):
        parts: list[Any] = [{"type": "text", "text": f"And {turn}?"}]
        if turn == 0:
            parts.insert(0, {"type": "image", "image": FIRST})
        messages.append({"role": "user", "content": parts})
        (answer,) = llm.chat(messages, SHORT)
        (wanted,) = other.chat(messages, SHORT)
        assert tokens(answer) == tokens(wanted)
        common = 0
        for mine, theirs in zip(known, answer.prompt_token_ids, strict=False):
            if mine != theirs:  # what was generated may be spelled with other tokens
                break
            common += 1
        assert answer.num_cached_tokens == common // BLOCK_SIZE * BLOCK_SIZE
        if turn:
            assert common > len(known) // 2
        known = (answer.prompt_token_ids + tokens(answer))[:-1]
        messages.append({"role": "assistant", "content": answer.outputs[0].text})
    assert num_encoded(llm) - encoded == 1
