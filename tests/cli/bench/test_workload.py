"""Workloads: as long as asked, the same for a seed, and nothing shared unless asked for."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from mm_engine.cli.bench.bodies import CHAT, COMPLETIONS, Bodies, Endpoint
from mm_engine.cli.bench.workload import (
    ImageSize,
    Shape,
    WordPool,
    Workload,
    draw_image,
    read_image_size,
)
from mm_engine.plugins.discovery import demos
from tokenizing import KINDS, bytes_only, tokenizer_of

BLOCK = 16  # tokens that a prefix cache keeps together


TOKENIZERS = {
    "single bytes": bytes_only,
    **{kind: partial(tokenizer_of, kind) for kind in KINDS},
    "the demo's": lambda: AutoTokenizer.from_pretrained(min(demos().values())),
}


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return TOKENIZERS[request.param]()


@pytest.fixture(scope="module")
def pool(tokenizer: Any) -> WordPool:
    return WordPool(tokenizer)


def shape(**changes: Any) -> Shape:
    return Shape(**{"input_len": 64, "output_len": 8, **changes})


@pytest.mark.parametrize("num_tokens", [1, 2, 15, 64, 777])
def test_a_text_has_the_tokens_asked_for(pool: WordPool, tokenizer: Any, num_tokens: int) -> None:
    workload = Workload(shape(), pool)
    for index in range(20):
        ids = tokenizer(workload.text(index, num_tokens), add_special_tokens=False)["input_ids"]
        # Some tokenizers put a token of their own before whatever begins a text.
        assert len(ids) == num_tokens or (num_tokens == 1 and len(ids) == 2)
        assert not set(ids) & set(tokenizer.all_special_ids)


def test_ids_are_as_many_as_asked_for_and_within_the_model(tokenizer: Any) -> None:
    workload = Workload(shape(input_len=500), WordPool(tokenizer, vocab_size=200))
    ids = workload.text_ids(0)
    assert len(ids) == 500
    assert max(ids) < 200


def test_a_seed_makes_the_same_prompts_and_another_seed_others(pool: WordPool) -> None:
    first, again, other = (Workload(shape(seed=seed), pool) for seed in (1, 1, 2))
    assert [first.text(i, 64) for i in range(5)] == [again.text(i, 64) for i in range(5)]
    assert first.text_ids(3) == again.text_ids(3)
    assert first.text(0, 64) != other.text(0, 64)


def test_no_two_prompts_share_a_block(pool: WordPool) -> None:
    blocks = [
        tuple(Workload(shape(), pool, stream=stream).text_ids(index)[:BLOCK])
        for stream in (0, 1)  # what warms up shares nothing with what is measured, either
        for index in range(200)
    ]
    assert len(set(blocks)) == 400


def test_a_prefix_is_the_same_for_all_prompts_of_a_stream(pool: WordPool) -> None:
    asked = shape(prefix_len=32)
    prefix = Workload(asked, pool).prefix()
    assert len(pool.encode(prefix)) == len(Workload(asked, pool).prefix_ids()) == 32
    assert prefix == Workload(asked, pool).prefix() != Workload(asked, pool, stream=1).prefix()


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS])
def test_bodies_begin_with_the_prefix_and_ask_for_whole_answers(
    pool: WordPool, endpoint: Endpoint
) -> None:
    bodies = Bodies(Workload(shape(prefix_len=32), pool), "demo", endpoint)
    first, second = (json.loads(bodies.body(index)) for index in (0, 1))
    begin = bodies.workload.prefix()
    for body in (first, second):
        if endpoint == CHAT:  # many templates put images before all text of a user's message
            assert body["messages"][0] == {"role": "system", "content": begin}
        else:
            assert body["prompt"].startswith(begin)
        assert (body["max_tokens"], body["ignore_eos"], body["stream"]) == (8, True, True)
    assert first != second


def with_images(**changes: Any) -> Shape:
    return shape(num_images=1, image_sizes=(ImageSize(20, 10),), **changes)


def test_images_have_the_size_asked_for_and_no_two_are_equal(pool: WordPool) -> None:
    workload = Workload(with_images(), pool)
    images = [image for index in range(50) for image in workload.images(index)]
    assert {image.size for image in images} == {(20, 10)}
    assert len({image.tobytes() for image in images}) == 50


def test_a_repeated_image_is_one_of_an_earlier_prompt(pool: WordPool) -> None:
    workload = Workload(with_images(image_repeats=0.5), pool)
    seen: set[bytes] = set()
    num_repeats = 0
    for index in range(200):
        (image,) = workload.images(index)
        repeats = workload.source(index) != index
        assert (image.tobytes() in seen) == repeats
        seen.add(image.tobytes())
        num_repeats += repeats
    assert 70 < num_repeats < 130
    assert len({tuple(workload.text_ids(index)) for index in range(200)}) == 200


def test_sizes_are_drawn_by_their_weights(pool: WordPool) -> None:
    sizes = (ImageSize(2, 1), ImageSize(1, 2, weight=3.0))
    workload = Workload(shape(num_images=2, image_sizes=sizes), pool)
    drawn = Counter(image.size for index in range(200) for image in workload.images(index))
    assert drawn[2, 1] + drawn[1, 2] == 400
    assert 0.15 < drawn[2, 1] / 400 < 0.35


def test_an_image_is_neither_flat_nor_noise() -> None:
    pixels = np.asarray(draw_image(ImageSize(200, 100), np.random.default_rng(0)), dtype=float)
    assert pixels.std() > 30
    assert np.abs(np.diff(pixels, axis=1)).mean() < 0.5 * pixels.std()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("336x336", ImageSize(336, 336)),
        ("672X336:3", ImageSize(672, 336, 3.0)),
        (" 1×2:0.5 ", ImageSize(1, 2, 0.5)),
    ],
)
def test_image_sizes_are_read(text: str, size: ImageSize) -> None:
    assert read_image_size(text) == size


@pytest.mark.parametrize("text", ["", "336", "336x", "0x5", "5x0", "-1x5", "99999x1", "1x1:0", "a"])
def test_what_is_no_image_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="--image-size can't be read"):
        read_image_size(text)
