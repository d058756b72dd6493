"""`LLM`, used as vLLM's is used."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from checkpoints import CHAT_TEMPLATE, SPECIAL, make_llava
from mm_engine import LLM, SamplingParams
from mm_engine.errors import RequestError, StartupError
from parity import picture
from pictures import data_url, encode

IMAGE_ID = SPECIAL.index("<image>")
GREEDY = SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True)
PICTURE = picture(1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), dtype="float32", progress=False)


def ids_of(output: Any) -> list[int]:
    ids: list[int] = output.outputs[0].token_ids
    return ids


def test_prompt_is_a_text_a_dict_or_ids_alone_or_in_a_list(llm: LLM) -> None:
    text = "Hello there"
    ids = llm.pipeline.ctx.tokenizer(text)["input_ids"]
    single: list[Any] = [text, {"prompt": text}, {"prompt_token_ids": ids}]
    outputs = [llm.generate(prompt, GREEDY) for prompt in single]
    assert [len(output) for output in outputs] == [1, 1, 1]
    together = llm.generate(single, GREEDY)
    assert [ids_of(output) for output in together] == [ids_of(output[0]) for output in outputs]
    assert ids_of(together[0]) == ids_of(together[1]) == ids_of(together[2])
    assert [output.prompt for output in together] == [text, text, None]
    assert llm.generate([], GREEDY) == []


def test_output_has_vllms_fields(llm: LLM) -> None:
    output = llm.generate("Hello there", GREEDY)[0]
    assert output.finished and output.error is None
    completion = output.outputs[0]
    assert completion.index == 0
    assert len(completion.token_ids) == 8
    assert completion.text == llm.pipeline.ctx.tokenizer.decode(
        completion.token_ids, skip_special_tokens=True
    )
    assert completion.finish_reason == "length" and completion.stop_reason is None
    assert completion.logprobs is None


def test_answers_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"{'word ' * i}question {i}" for i in range(12)]
    lengths = [SamplingParams(temperature=0.0, max_tokens=12 - i) for i in range(12)]
    outputs = llm.generate(prompts, lengths)
    assert [output.prompt for output in outputs] == prompts
    for output, prompt, params in zip(outputs, prompts, lengths, strict=True):
        assert ids_of(output) == ids_of(llm.generate(prompt, params)[0])


def test_picture_expands_in_the_prompts_ids(llm: LLM) -> None:
    single = llm.generate({"prompt": "a <image>", "multi_modal_data": {"image": PICTURE}}, GREEDY)
    listed = llm.generate({"prompt": "a <image>", "multi_modal_data": {"image": [PICTURE]}}, GREEDY)
    assert single[0].prompt_token_ids.count(IMAGE_ID) == 16
    assert single[0].prompt == "a <image>"
    assert ids_of(single[0]) == ids_of(listed[0])
    other = {"prompt": "a <image>", "multi_modal_data": {"image": picture(2)}}
    assert ids_of(llm.generate(other, GREEDY)[0]) != ids_of(single[0])


def chat(*content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def test_chat_takes_pictures_as_pil_images_and_as_data_urls(llm: LLM) -> None:
    text = {"type": "text", "text": "What is it?"}
    as_pil = chat({"type": "image", "image": PICTURE}, text)
    as_url = chat({"type": "image_url", "image_url": {"url": data_url(encode(PICTURE))}}, text)
    as_other = chat({"type": "image", "image": picture(2)}, text)
    raw = {
        "prompt": "USER: <image>\nWhat is it? ASSISTANT:",
        "multi_modal_data": {"image": PICTURE},
    }
    answers = [ids_of(output) for output in llm.chat([as_pil, as_url, as_other], GREEDY)]
    assert answers[0] == answers[1] == ids_of(llm.generate(raw, GREEDY)[0])
    assert answers[2] != answers[0]
    single = llm.chat(as_url, GREEDY)
    assert len(single) == 1 and ids_of(single[0]) == answers[0]


def test_pictures_of_both_kinds_keep_their_order(llm: LLM) -> None:
    as_pil = {"type": "image", "image": PICTURE}
    as_url = {"type": "image_url", "image_url": {"url": data_url(encode(picture(2)))}}
    last_url = {"type": "image_url", "image_url": {"url": data_url(encode(picture(3)))}}
    second, third = ({"type": "image", "image": picture(seed)} for seed in (2, 3))
    mixed, plain, turned = llm.chat(
        [chat(as_url, as_pil, last_url), chat(second, as_pil, third), chat(third, as_pil, second)],
        GREEDY,
    )
    assert ids_of(mixed) == ids_of(plain) != ids_of(turned)


def test_chat_template_and_generation_prompt_are_options(llm: LLM) -> None:
    messages = chat({"type": "text", "text": "hi"})
    template = CHAT_TEMPLATE.replace("ASSISTANT", "BOT")
    prompts = [
        llm.chat(messages, GREEDY)[0].prompt,
        llm.chat(messages, GREEDY, chat_template=template)[0].prompt,
        llm.chat(messages, GREEDY, add_generation_prompt=False)[0].prompt,
    ]
    assert prompts == ["<s>USER: hi ASSISTANT:", "<s>USER: hi BOT:", "<s>USER: hi "]


def test_n_completions_each_with_a_seed_of_its_own(llm: LLM) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=8, ignore_eos=True)
    output = llm.generate("Hello", params)[0]
    assert [completion.index for completion in output.outputs] == [0, 1, 2]
    assert len({tuple(completion.token_ids) for completion in output.outputs}) == 3
    alone = SamplingParams(temperature=1.0, seed=7, max_tokens=8, ignore_eos=True)
    assert ids_of(llm.generate("Hello", alone)[0]) == output.outputs[2].token_ids


def test_seed_repeats_an_answer(llm: LLM) -> None:
    def sample(seed: int) -> list[int]:
        return ids_of(llm.generate("Hello", SamplingParams(temperature=1.0, seed=seed))[0])

    assert sample(1) == sample(1) != sample(2)


def test_logprobs_hold_the_chosen_token_and_the_top_ones(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=4, logprobs=3, ignore_eos=True)
    completion = llm.generate("Hello", params)[0].outputs[0]
    assert completion.logprobs is not None and len(completion.logprobs) == 4
    for token, entry in zip(completion.token_ids, completion.logprobs, strict=True):
        assert len(entry) == 3
        assert entry[token].rank == 1
        assert entry[token].logprob == max(value.logprob for value in entry.values()) < 0
        assert entry[token].decoded_token is not None


def test_stop_string_ends_the_answer(llm: LLM) -> None:
    whole = llm.generate("Hello", GREEDY)[0].outputs[0].text
    stop = next(character for character in whole[1:] if character.isalnum())
    params = SamplingParams(temperature=0.0, max_tokens=8, stop=stop, ignore_eos=True)
    completion = llm.generate("Hello", params)[0].outputs[0]
    assert completion.text == whole[: whole.index(stop)]
    assert completion.finish_reason == "stop" and completion.stop_reason == stop


def test_params_for_each_prompt_must_be_as_many(llm: LLM) -> None:
    short, long = (SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (2, 5))
    outputs = llm.generate(["Hello", "Hello"], [short, long])
    assert [len(ids_of(output)) for output in outputs] == [2, 5]
    with pytest.raises(RequestError, match="don't match the prompts: 1 for 2"):
        llm.generate(["Hello", "Hello"], [short])


@pytest.mark.parametrize(
    "bad",
    [
        {"prompt": "<image>"},
        {"prompt": "x", "multi_modal_data": {"image": PICTURE}},
        {"prompt": "<image>", "multi_modal_data": {"image": "file.png"}},
        {"prompt": "half \ud800"},
        {"prompt": "a " * 600},
        {"prompt_token_ids": [10**6]},
        {},
    ],
    ids=lambda bad: str(bad)[:24].encode("ascii", "replace").decode(),
)
def test_bad_prompt_runs_none_and_leaves_the_engine_usable(llm: LLM, bad: Any) -> None:
    before = llm.engine.stats().num_prompt_tokens
    with pytest.raises(RequestError):
        llm.generate(["Hello", bad, "Hello"], GREEDY)
    stats = llm.engine.stats()
    assert not llm.engine.has_work
    assert stats.num_prompt_tokens == before
    assert stats.num_used_blocks == stats.num_running == stats.num_waiting == 0
    assert len(ids_of(llm.generate("Hello", GREEDY)[0])) == 8


@pytest.mark.parametrize(
    ("part", "match"),
    [
        ({"type": "image_url", "image_url": {"url": "https://x.test/a.png"}}, "data URL"),
        ({"type": "image_url", "image_url": {"url": 3}}, "must hold a url"),
        ({"type": "image_url"}, "must hold a url"),
        ({"type": "video"}, "a text or an image"),
    ],
)
def test_bad_part_is_refused(llm: LLM, part: Any, match: str) -> None:
    with pytest.raises(RequestError, match=match) as caught:
        llm.chat(chat(part), GREEDY)
    assert (caught.value.param or "").startswith("messages.0.content.0")
    assert not llm.engine.has_work


def test_conversation_that_is_empty_is_refused(llm: LLM) -> None:
    with pytest.raises(RequestError, match="messages is empty"):
        llm.chat([], GREEDY)


def test_unknown_option_is_a_type_error(checkpoint: Path) -> None:
    with pytest.raises(TypeError, match="tensor_parallel"):
        LLM(str(checkpoint), tensor_parallel=2)


def test_missing_checkpoint_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="not found.*Name a checkpoint's folder or a Hub id"):
        LLM(str(tmp_path / "gone"))
    with pytest.raises(StartupError, match="no config.json"):
        LLM(str(tmp_path))


def test_unknown_architecture_names_the_remedy(checkpoint: Path, tmp_path: Path) -> None:
    config = (checkpoint / "config.json").read_text()
    name = "LlavaForConditionalGeneration"
    (tmp_path / "config.json").write_text(config.replace(name, "StrangeForGeneration"))
    with pytest.raises(StartupError, match=r"StrangeForGeneration\. Install a plugin.*--plugin"):
        LLM(str(tmp_path))
