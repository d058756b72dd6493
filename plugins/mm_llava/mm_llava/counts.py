"""How many tokens an image takes."""

from __future__ import annotations

from typing import Any

from mm_engine.models import num_tower_rows


def num_image_tokens(config: Any) -> int:
    """Rows that the projector makes of one image, whatever its size was.

    Source: `LlavaModel.get_image_features` in transformers.
    """
    return num_tower_rows(config.vision_config, config.vision_feature_select_strategy)
