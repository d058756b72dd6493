"""The count of an image's tokens is the number of rows that transformers' model makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mm_engine.plugins import StartupError
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaModel, SiglipVisionConfig

from mm_llava.counts import num_image_tokens

TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
SIZES = ((16, 8), (32, 8), (30, 8), (39, 8), (8, 8), (48, 14), (28, 7))


def config_of(tower: str, image_size: int, patch_size: int, strategy: str, layer: Any) -> Any:
    common = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = TOWERS[tower](
        **common, num_hidden_layers=2, image_size=image_size, patch_size=patch_size
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**common, num_hidden_layers=1, vocab_size=8),
        image_token_index=7,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )


@pytest.mark.parametrize("layer", [-2, [-2, -1]], ids=["one-layer", "two-layers"])
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize(("image_size", "patch_size"), SIZES)
@pytest.mark.parametrize("tower", TOWERS)
def test_count_equals_the_rows_of_transformers(
    tower: str, image_size: int, patch_size: int, strategy: str, layer: Any
) -> None:
    config = config_of(tower, image_size, patch_size, strategy, layer)
    pixels = torch.zeros(1, 3, image_size, image_size)
    with torch.inference_mode():
        features = LlavaModel(config).eval().get_image_features(pixels, return_dict=True)
    (rows,) = features.pooler_output
    assert num_image_tokens(config) == len(rows)


def test_count_of_the_published_checkpoints() -> None:
    assert num_image_tokens(config_of("clip", 336, 14, "default", -2)) == 576


@pytest.mark.parametrize(("image", "patch"), [(32, 0), (0, 8), (8, 32), (-32, 8), ("32", 8)])
def test_a_tower_without_patches_is_refused(image: Any, patch: int) -> None:
    vision = SimpleNamespace(model_type="clip_vision_model", image_size=image, patch_size=patch)
    config = SimpleNamespace(vision_config=vision, vision_feature_select_strategy="default")
    with pytest.raises(StartupError, match=f"leave no patch: {image!r} and {patch!r} pixels"):
        num_image_tokens(config)
