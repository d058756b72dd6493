"""Masks and keywords of attention calls are understood, or refused."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import masking_utils

from checkpoints import text_config
from decoding import make_decoder, run_paged
from mm_engine.errors import StartupError
from mm_engine.models.transformers_attention import (
    Mask,
    Unsupported,
    _attend,
    read_call,
    read_layers,
    tokens_apart,
)

causal = masking_utils.causal_mask_function
sliding = masking_utils.sliding_window_causal_mask_function
no_padding = torch.zeros(1, dtype=torch.int64)


@given(window=st.integers(1, 90), max_len=st.integers(1, 80))
def test_a_windows_width_is_read_from_its_mask(window: int, max_len: int) -> None:
    assert Mask(sliding(window)).window(max_len) == (window if window < max_len else None)


@given(max_len=st.integers(1, 80))
def test_a_causal_mask_has_no_window(max_len: int) -> None:
    assert Mask(causal).window(max_len) is None


def prefix_sees_itself(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    return (key <= query) | (key < 2)


def tokens_see_themselves_alone(
    _: Any, __: Any, query: torch.Tensor, key: torch.Tensor
) -> torch.Tensor:
    return key == query - 1


@pytest.mark.parametrize(
    "sees",
    [
        masking_utils.bidirectional_mask_function,
        masking_utils.sliding_window_bidirectional_mask_function(5),
        masking_utils.chunked_causal_mask_function(8, no_padding),
        masking_utils.chunked_causal_mask_function(31, no_padding),
        prefix_sees_itself,
        tokens_see_themselves_alone,
    ],
)
def test_other_masks_are_refused(sees: Callable[..., torch.Tensor]) -> None:
    with pytest.raises(Unsupported, match="neither causal nor a window"):
        Mask(sees).window(32)


def test_a_chunk_that_no_sequence_fills_is_causal() -> None:
    assert Mask(masking_utils.chunked_causal_mask_function(32, no_padding)).window(32) is None


def call(**changes: Any) -> Any:
    """The arguments of one call, as transformers' layers make it."""
    arguments: dict[str, Any] = {
        "module": torch.nn.Module(),
        "query": torch.zeros(1, 4, 3, 8),
        "key": torch.zeros(1, 2, 3, 8),
        "value": torch.zeros(1, 2, 3, 8),
        "mask": Mask(causal),
        "keywords": {},
    }
    return read_call(**{**arguments, **changes})


@pytest.mark.parametrize(
    "keywords",
    [
        {"dropout": 0.0, "scaling": 0.5, "sliding_window": None},
        {"position_ids": torch.zeros(1, 3), "use_cache": True, "output_attentions": False},
        {"s_aux": None, "is_causal": True, "cu_seq_lens_q": None},
    ],
    ids=["usual", "harmless", "absent"],
)
def test_keywords_that_change_nothing_are_passed_over(keywords: dict[str, Any]) -> None:
    assert call(keywords=keywords).head_dim == 8


@pytest.mark.parametrize(
    "keywords",
    [
        {"s_aux": torch.zeros(4)},
        {"position_bias": torch.zeros(4)},
        {"indices": torch.zeros(4)},
        {"dropout": 0.1},
        {"cache": SimpleNamespace()},
        {"something_new": True},
    ],
    ids=lambda keywords: next(iter(keywords)),
)
def test_keywords_that_nothing_honours_are_refused(keywords: dict[str, Any]) -> None:
    with pytest.raises(Unsupported, match=f"attention with {next(iter(keywords))}"):
        call(keywords=keywords)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"key": torch.zeros(1, 2, 5, 8), "value": torch.zeros(1, 2, 5, 8)}, "other keys"),
        ({"mask": torch.zeros(1, 1, 3, 3)}, "model's own making"),
        ({"mask": None, "keywords": {"is_causal": False}}, "isn't causal"),
        ({"query": torch.zeros(1, 3, 3, 8)}, "shapes"),
        ({"value": torch.zeros(1, 2, 3, 9)}, "shapes"),
    ],
)
def test_attention_of_another_kind_is_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        call(**changes)


def test_a_module_that_says_it_is_not_causal_is_refused_without_a_mask() -> None:
    module = torch.nn.Module()
    module.is_causal = False
    with pytest.raises(Unsupported, match="isn't causal"):
        call(module=module, mask=None)
    assert call(module=module).num_heads == 4  # the mask decides, as in transformers


def test_apart_a_tokens_answer_follows_from_its_own_query_key_and_value() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, heads, 3, 8, generator=generator) for heads in (4, 2, 2)]
    expected = tokens_apart(torch.nn.Module(), *tensors, None, {})
    assert expected.shape == (1, 3, 4, 8)
    for tensor in tensors:
        tensor[:, :, 1] += 1.0
        got = tokens_apart(torch.nn.Module(), *tensors, None, {})
        assert torch.equal(got[:, ::2], expected[:, ::2])
        assert not torch.isclose(got[:, 1], expected[:, 1]).any()
        expected = got


def test_a_call_that_changes_after_the_model_was_built_is_refused() -> None:
    decoder = make_decoder(text_config("gemma2"))
    ids = torch.arange(5)
    run_paged(decoder, ids, [5])
    decoder.backbone.layers[1].self_attn.scaling = 0.7
    with pytest.raises(StartupError, match="attention of Gemma2Attention isn't what it was"):
        run_paged(decoder, ids, [5])


def test_a_keyword_that_arrives_only_in_a_step_is_refused_in_that_step() -> None:
    decoder = make_decoder(text_config("gemma2"))
    ids, attention = torch.arange(5), decoder.backbone.layers[1].self_attn
    run_paged(decoder, ids, [5])
    attend = type(attention).forward
    attention.forward = lambda *args, **kw: attend(attention, *args, s_aux=torch.ones(1), **kw)
    with pytest.raises(StartupError, match="gemma2 .attention with s_aux"):
        run_paged(decoder, ids, [5])


def attention_of(module: Any, mask: Any, **keywords: Any) -> None:
    query, key = torch.zeros(1, 4, 3, 8), torch.zeros(1, 2, 3, 8)
    _attend(module, query, key, key, mask, **keywords)


@pytest.mark.parametrize(("mask", "window"), [(Mask(causal), None), (Mask(sliding(8)), 8)])
def test_a_window_that_the_mask_does_not_have_is_refused(mask: Mask, window: int | None) -> None:
    module = torch.nn.Module()
    with pytest.raises(Unsupported, match=f"a sliding window of 5 beside a mask of {window}"):
        read_layers(lambda: attention_of(module, mask, sliding_window=5), max_len=32)


@pytest.mark.parametrize(
    ("mask", "given", "window"),
    [
        (Mask(sliding(8)), 8, 8),
        (Mask(sliding(8)), None, 8),
        (Mask(sliding(32)), 40, None),
        (Mask(causal), 32, None),
    ],
)
def test_a_window_that_agrees_with_the_mask_is_the_masks(
    mask: Mask, given: int | None, window: int | None
) -> None:
    module = torch.nn.Module()
    read = read_layers(lambda: attention_of(module, mask, sliding_window=given), max_len=32)
    assert [(module, layer.sliding_window) for module, layer in read] == [(module, window)]


def test_a_module_that_attends_twice_is_refused() -> None:
    module = torch.nn.Module()

    def twice() -> None:
        attention_of(module, Mask(causal))
        attention_of(module, Mask(causal))

    with pytest.raises(Unsupported, match="a layer that attends more than once"):
        read_layers(twice, max_len=32)
