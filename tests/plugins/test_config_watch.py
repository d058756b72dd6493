"""Writes to a config during a call are found and undone; those in between are others' business."""

from __future__ import annotations

import pytest
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig

from mm_engine.plugins.config_watch import ConfigWatch


@pytest.fixture
def config() -> LlavaConfig:
    return LlavaConfig(vision_config=CLIPVisionConfig(), text_config=LlamaConfig())


def test_what_is_written_during_a_call_is_undone_and_named(config: LlavaConfig) -> None:
    watch = ConfigWatch(config)
    with watch:
        assert watch.restore() is None
        config.text_config.vocab_size = 7
        assert watch.restore() == "vocab_size"
        config.invented = 1
        assert watch.restore() == "invented"
        del config.projector_hidden_act
        assert watch.restore() == "projector_hidden_act"
    assert config.text_config.vocab_size == LlamaConfig().vocab_size
    assert config.projector_hidden_act == "gelu"
    assert not hasattr(config, "invented")


def test_list_that_is_written_to_in_place_is_seen(config: LlavaConfig) -> None:
    config.image_grid_pinpoints = [[1, 2]]
    watch = ConfigWatch(config)
    with watch:
        config.image_grid_pinpoints[0].append(3)
        assert watch.restore() == "image_grid_pinpoints"
    assert config.image_grid_pinpoints == [[1, 2]]


def test_what_is_written_between_calls_stays(config: LlavaConfig) -> None:
    watch = ConfigWatch(config)
    for number in (1, 2):
        config.text_config.vocab_size = number  # as transformers writes when it builds a model
        with watch:
            assert watch.restore() is None
        assert config.text_config.vocab_size == number


def test_write_of_a_call_under_way_does_not_count_as_given_to_the_next(
    config: LlavaConfig,
) -> None:
    watch = ConfigWatch(config)
    with watch:
        config.image_seq_length = 3
        with watch:
            assert watch.restore() == "image_seq_length"
    assert config.image_seq_length == 576
