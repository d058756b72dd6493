"""Prompt and images to a `Request`: placeholders, limits, ids, and the dummy request."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessorPil

from checkpoints import SPECIAL, VOCAB_SIZE, make_tokenizer
from mm_engine.config import EngineConfig
from mm_engine.errors import RequestError, StartupError
from mm_engine.inputs.pipeline import InputPipeline, PreparedPrompt
from mm_engine.request import PromptInputs
from mm_engine.sampling_params import SamplingParams
from mm_engine.worker.loader import open_model
from parity import picture

IMAGE_ID = SPECIAL.index("<image>")
NUM_ROWS = 16  # of one image
MAX_LEN = 512
PICTURES = tuple(picture(seed, 30 + seed, 40) for seed in range(9))


def prepare(pipeline: InputPipeline, prompt: str | None, *images: Any, **more: Any) -> Any:
    data = {"image": images} if images else {}
    return pipeline.prepare(PromptInputs(prompt=prompt, multi_modal_data=data, **more))


def pixels_of(checkpoint: Path, image: Image.Image) -> torch.Tensor:
    """What transformers' image processor makes of it."""
    processor = CLIPImageProcessorPil.from_pretrained(checkpoint)
    pixels: torch.Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0]
    return pixels


def test_each_placeholder_becomes_its_images_rows(
    pipeline: InputPipeline, checkpoint: Path
) -> None:
    raw = pipeline.ctx.tokenizer("a <image> b <image>")["input_ids"]
    prepared = prepare(pipeline, "a <image> b <image>", *PICTURES[:2])
    expanded = [t for token in raw for t in [token] * (NUM_ROWS if token == IMAGE_ID else 1)]
    assert list(prepared.prompt_token_ids) == expanded
    for item, image in zip(prepared.items, PICTURES, strict=False):
        place = item.placeholder
        assert place.length == NUM_ROWS
        assert set(expanded[place.offset : place.end]) == {IMAGE_ID}
        assert torch.equal(item.tensors["pixel_values"], pixels_of(checkpoint, image))
    first, second = (item.placeholder.offset for item in prepared.items)
    assert [first, second] == [raw.index(IMAGE_ID), len(expanded) - NUM_ROWS]


def test_images_anywhere_in_several_messages_keep_their_order(
    pipeline: InputPipeline, checkpoint: Path
) -> None:
    parts = [{"type": "image", "image": image} for image in PICTURES[:4]]
    hello = {"type": "text", "text": "hello <image>"}
    messages = [
        {"role": "user", "content": [parts[0], hello, parts[1]]},
        {"role": "assistant", "content": "a ring"},
        {"role": "user", "content": [hello, parts[2], parts[3]]},
    ]
    prepared = pipeline.prepare_chat(messages)
    assert [item.placeholder.item for item in prepared.items] == [0, 1, 2, 3]
    offsets = [item.placeholder.offset for item in prepared.items]
    assert offsets == sorted(offsets)
    assert prepared.prompt_token_ids.count(IMAGE_ID) == 4 * NUM_ROWS
    for item, image in zip(prepared.items, PICTURES, strict=False):
        assert torch.equal(item.tensors["pixel_values"], pixels_of(checkpoint, image))


@pytest.mark.parametrize(
    ("prompt", "num_images", "match"),
    [
        ("no place", 1, r"0 placeholders for 1 image\. Put one <image>"),
        ("<image> <image>", 1, "2 placeholders for 1 image"),
        ("<image>", 2, "1 placeholder for 2 images"),
        ("<image>", 0, "1 placeholder for 0 images"),
        ("<image>" * 9, 9, r"too many images: 9\. At most 8"),
    ],
)
def test_prompt_and_images_must_agree(
    pipeline: InputPipeline, prompt: str, num_images: int, match: str
) -> None:
    with pytest.raises(RequestError, match=match):
        prepare(pipeline, prompt, *PICTURES[:num_images])


def test_too_many_images_in_a_chat(pipeline: InputPipeline) -> None:
    content = [{"type": "image", "image": image} for image in PICTURES]
    with pytest.raises(RequestError, match="too many images: 9"):
        pipeline.prepare_chat([{"role": "user", "content": content}])


def test_ids_are_taken_raw_or_already_expanded(pipeline: InputPipeline) -> None:
    raw = tuple(pipeline.ctx.tokenizer("a <image> b")["input_ids"])
    from_text = prepare(pipeline, "a <image> b", PICTURES[0])
    from_raw = prepare(pipeline, None, PICTURES[0], prompt_token_ids=raw)
    expanded = from_text.prompt_token_ids
    from_expanded = prepare(pipeline, None, PICTURES[0], prompt_token_ids=expanded)
    assert len(expanded) == len(raw) + NUM_ROWS - 1
    for other in (from_raw, from_expanded):
        assert other.prompt is None
        assert other.prompt_token_ids == expanded
        assert [i.placeholder for i in other.items] == [i.placeholder for i in from_text.items]


def test_expanded_ids_must_be_in_one_piece(pipeline: InputPipeline) -> None:
    ids = (1, *[IMAGE_ID] * (NUM_ROWS - 1), 50, IMAGE_ID)
    with pytest.raises(RequestError, match="not in one piece"):
        prepare(pipeline, None, PICTURES[0], prompt_token_ids=ids)


@pytest.mark.parametrize(
    ("ids", "match"),
    [
        ((1, VOCAB_SIZE), rf"out of range: {VOCAB_SIZE}\. Ids go from 0 to {VOCAB_SIZE - 1}"),
        ((-1,), "out of range: -1"),
        ((True,), "must be integers"),
        ((1.0,), "must be integers"),
        (("1",), "must be integers"),
        ((), "the prompt is empty"),
    ],
)
def test_bad_ids_are_refused(pipeline: InputPipeline, ids: tuple[Any, ...], match: str) -> None:
    with pytest.raises(RequestError, match=match):
        prepare(pipeline, None, prompt_token_ids=ids)


def test_last_id_of_the_vocabulary_is_taken(pipeline: InputPipeline) -> None:
    ids = (0, VOCAB_SIZE - 1)
    assert prepare(pipeline, None, prompt_token_ids=ids).prompt_token_ids == ids


def test_either_text_or_ids(pipeline: InputPipeline) -> None:
    for prompt, ids in ((None, None), ("a", (1,))):
        with pytest.raises(RequestError, match="either a prompt or prompt_token_ids"):
            prepare(pipeline, prompt, prompt_token_ids=ids)


@pytest.mark.parametrize("half", ["\ud800", "a \udc80 b"])
def test_lone_surrogates_are_refused(pipeline: InputPipeline, half: str) -> None:
    with pytest.raises(RequestError, match="half of a surrogate pair"):
        prepare(pipeline, half)


def test_nul_is_a_character_like_others(pipeline: InputPipeline) -> None:
    ids = prepare(pipeline, "a\0b").prompt_token_ids
    assert pipeline.ctx.tokenizer.decode(list(ids)) == "<s>a\0b"


def request_of(pipeline: InputPipeline, num_tokens: int, **params: Any) -> Any:
    prepared = PreparedPrompt(None, (50,) * num_tokens)
    return pipeline.request(prepared, SamplingParams(**params))


def test_prompt_that_leaves_no_room_is_too_long(pipeline: InputPipeline) -> None:
    assert request_of(pipeline, MAX_LEN - 1, max_tokens=None).sampling_params.max_tokens == 1
    with pytest.raises(RequestError, match=rf"too long: {MAX_LEN} tokens.*{MAX_LEN - 1}") as caught:
        request_of(pipeline, MAX_LEN, max_tokens=None)
    assert caught.value.code == "context_length_exceeded"


def test_limit_of_the_kv_cache_counts_too(pipeline: InputPipeline) -> None:
    pipeline.limit_length(100)
    pipeline.limit_length(200)  # a limit is never raised
    assert request_of(pipeline, 60, max_tokens=None).sampling_params.max_tokens == 40
    with pytest.raises(RequestError, match="too long: 100 tokens"):
        request_of(pipeline, 100)


def test_max_tokens_is_what_was_asked_if_there_is_room(pipeline: InputPipeline) -> None:
    room = MAX_LEN - 10
    assert request_of(pipeline, 10).sampling_params.max_tokens == 16
    assert request_of(pipeline, 10, max_tokens=None).sampling_params.max_tokens == room
    assert request_of(pipeline, 10, max_tokens=room).sampling_params.max_tokens == room
    with pytest.raises(RequestError, match=f"too large: {room + 1}.*at most {room}") as caught:
        request_of(pipeline, 10, max_tokens=room + 1)
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize("name", ["stop_token_ids", "logit_bias"])
def test_ids_in_params_are_of_the_vocabulary(pipeline: InputPipeline, name: str) -> None:
    def value(token: int) -> Any:
        return {token: 1.0} if name == "logit_bias" else (token,)

    request_of(pipeline, 1, **{name: value(VOCAB_SIZE - 1)})
    with pytest.raises(RequestError, match=f"{name} names a token.*: {VOCAB_SIZE}") as caught:
        request_of(pipeline, 1, **{name: value(VOCAB_SIZE)})
    assert caught.value.param == name


def test_request_holds_the_prompt_and_an_id_of_its_own(pipeline: InputPipeline) -> None:
    prepared = prepare(pipeline, "a <image>", PICTURES[0])
    requests = [pipeline.request(prepared, SamplingParams()) for _ in range(2)]
    assert requests[0].request_id != requests[1].request_id
    assert requests[0].prompt_token_ids == prepared.prompt_token_ids
    assert requests[0].items == prepared.items
    assert requests[0].eos_token_ids == (2,)


@pytest.mark.parametrize(
    ("options", "num_tokens", "num_items"),
    [
        ({}, NUM_ROWS + 16, 1),  # on a CPU one image is enough
        ({"max_model_len": 20}, 19, 1),
        ({"limit_mm_per_prompt": {"image": 0}}, 16, 0),
    ],
)
def test_dummy_request(
    checkpoint: Path, options: dict[str, Any], num_tokens: int, num_items: int
) -> None:
    config = EngineConfig(model=str(checkpoint), device="cpu", **options)
    dummy = InputPipeline(open_model(config)).dummy_request()
    assert len(dummy.prompt_token_ids) == num_tokens
    assert len(dummy.items) == num_items
    assert dummy.prompt_token_ids.count(IMAGE_ID) == num_items * NUM_ROWS
    assert dummy.sampling_params.max_tokens == 1


def test_image_that_never_fits_is_said_at_startup(checkpoint: Path) -> None:
    opened = open_model(EngineConfig(model=str(checkpoint), max_model_len=NUM_ROWS))
    with pytest.raises(StartupError, match=r"takes up to 16 tokens.*is 16\. Raise"):
        InputPipeline(opened).dummy_request()


def test_tokenizer_without_the_image_token_is_said_at_startup(
    copy: Path, open_with: Callable[..., InputPipeline]
) -> None:
    config = (copy / "config.json").read_text()
    assert '"image_token_index": 4' in config or '"image_token_id": 4' in config
    (copy / "config.json").write_text(
        config.replace('_index": 4', '_index": 9999').replace('_id": 4', '_id": 9999')
    )
    with pytest.raises(StartupError, match="no token for the config's image_token_.*: 9999"):
        open_with(make_tokenizer())


def test_unknown_modality_and_things_that_are_no_images(pipeline: InputPipeline) -> None:
    inputs = PromptInputs(prompt="a", multi_modal_data={"sound": (b"",)})
    with pytest.raises(RequestError, match="modality is not known: sound"):
        pipeline.prepare(inputs)
    with pytest.raises(RequestError, match="not a PIL image: bytes"):
        prepare(pipeline, "<image>", b"png")
    with pytest.raises(RequestError, match="not a PIL image: NoneType"):
        pipeline.prepare_chat([{"role": "user", "content": [{"type": "image"}]}])


def test_prepared_prompts_are_values(pipeline: InputPipeline) -> None:
    prepared = prepare(pipeline, "a <image>", PICTURES[0])
    with pytest.raises(dataclasses.FrozenInstanceError):
        prepared.prompt = "other"
