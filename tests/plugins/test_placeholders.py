"""Placeholders: one token for each item becomes its count of tokens, and a range."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_engine.config import ModelContext
from mm_engine.errors import RequestError, StartupError
from mm_engine.plugins import PlaceholderRange, PromptInputs, expand_placeholders
from mm_engine.plugins.placeholders import image_token, placeholder_token_id

IMAGE = 3


def expand(ids: list[int], counts: Any) -> PromptInputs:
    return expand_placeholders(PromptInputs(prompt_token_ids=tuple(ids)), IMAGE, counts)


def test_each_placeholder_becomes_its_count() -> None:
    got = expand([1, IMAGE, IMAGE, 2], [2, 3])
    assert got.prompt_token_ids == (1, *[IMAGE] * 5, 2)
    assert got.placeholders == (
        PlaceholderRange("image", 0, 1, 2),
        PlaceholderRange("image", 1, 3, 3),
    )


@given(st.lists(st.integers(1, 9)), st.lists(st.integers(10, 20)), st.randoms())
def test_expanding_keeps_the_text_and_is_undone_by_its_ranges(
    counts: list[int], text: list[int], rng: Any
) -> None:
    ids = text + [IMAGE] * len(counts)
    rng.shuffle(ids)
    got = expand(ids, counts)
    assert [place.length for place in got.placeholders] == counts
    collapsed = list(got.prompt_token_ids or ())
    for place in reversed(got.placeholders):
        assert collapsed[place.offset : place.end] == [IMAGE] * place.length
        collapsed[place.offset : place.end] = [IMAGE]
    assert collapsed == ids
    assert expand(list(got.prompt_token_ids or ()), counts) == got  # expanded already: kept


def test_counts_may_name_their_modality() -> None:
    assert expand([IMAGE], {"video": [2]}).placeholders == (PlaceholderRange("video", 0, 0, 2),)


@pytest.mark.parametrize(
    ("ids", "counts", "message"),
    [
        ([1, IMAGE], [4, 4], "1 placeholder for 2 images. Put one placeholder token \\(id 3\\)"),
        ([IMAGE, IMAGE], [4], "2 placeholders for 1 image"),
        ([1], [4], "0 placeholders for 1 image"),
        ([IMAGE], [], "1 placeholder for 0 images"),
        ([IMAGE, 1, IMAGE, IMAGE], [3], "image 0 are not in one piece"),
    ],
)
def test_wrong_number_of_placeholders_is_the_callers_fault(
    ids: list[int], counts: list[int], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        expand(ids, counts)


@pytest.mark.parametrize("counts", [[0], [-1], {"image": [1], "video": [1]}, {}])
def test_impossible_counts_are_the_plugins_fault(counts: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        expand([IMAGE], counts)


def test_token_of_the_config_comes_first(ctx: ModelContext) -> None:
    assert placeholder_token_id(ctx) == IMAGE
    assert image_token(ctx) == "<image>"


def test_token_of_the_tokenizer_serves_where_the_config_names_none(ctx: ModelContext) -> None:
    ctx = dataclasses.replace(ctx, hf_config=SimpleNamespace())
    with pytest.raises(StartupError, match="neither config nor tokenizer names the image token"):
        placeholder_token_id(ctx)
    ctx.tokenizer.image_token = "<image>"
    assert placeholder_token_id(ctx) == IMAGE
    ctx.tokenizer.image_token = "<unheard of>"
    with pytest.raises(StartupError, match="neither config nor tokenizer"):
        placeholder_token_id(ctx)


@pytest.mark.parametrize("token_id", [32000, -200])
def test_tokenizer_without_the_configs_image_token_is_refused(
    ctx: ModelContext, token_id: int
) -> None:
    ctx.hf_config.image_token_index = token_id
    with pytest.raises(StartupError, match=f"the tokenizer has no token .*: {token_id}"):
        placeholder_token_id(ctx)


def test_image_token_that_the_config_contradicts_is_not_used(ctx: ModelContext) -> None:
    ctx.tokenizer.image_token = "a"
    assert image_token(ctx) == "<image>"


def test_count_beyond_all_reason_is_refused_before_memory_is_taken() -> None:
    inputs = PromptInputs(prompt_token_ids=(1, 7, 2))
    with pytest.raises(ValueError, match=r"expected counts of 1 to 1048576, got \[1000000000\]"):
        expand_placeholders(inputs, 7, [10**9])
