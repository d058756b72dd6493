"""How many tokens an image takes."""

from __future__ import annotations

from typing import Any

#: Towers whose first hidden state is a class token, not a patch.
TOWERS_WITH_CLASS_TOKEN = frozenset({"clip_vision_model"})


def num_image_tokens(config: Any) -> int:
    """Rows that the projector makes of one image, whatever its size was.

    The tower sees `image_size` pixels square in patches of `patch_size` (floor division), one
    class token beside them in CLIP; the strategy `default` drops the first row of any tower.
    Source: `LlavaModel.get_image_features` in transformers.
    """
    vision = config.vision_config
    num_rows: int = (vision.image_size // vision.patch_size) ** 2
    num_rows += vision.model_type in TOWERS_WITH_CLASS_TOKEN
    return num_rows - (config.vision_feature_select_strategy == "default")
