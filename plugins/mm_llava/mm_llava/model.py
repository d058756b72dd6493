"""LLaVA-1.5: a vision tower, a two-layer projector and a text decoder (arXiv:2310.03744)."""

from __future__ import annotations

from typing import Any

from mm_engine.models import (
    Projector,
    SupportsVision,
    build_decoder,
    build_vision_tower,
    select_features,
    tower_features,
)
from mm_engine.plugins import ModelContext
from torch import Tensor, nn


class LlavaForConditionalGeneration(SupportsVision, nn.Module):
    """The model as mm-engine runs it. `embed_images` is all that is LLaVA's own."""

    def __init__(self, ctx: ModelContext) -> None:
        super().__init__()
        config: Any = ctx.hf_config
        self.select_strategy = config.vision_feature_select_strategy
        self.vision_tower = build_vision_tower(config.vision_config, config.vision_feature_layer)
        self.multi_modal_projector = Projector(config)
        self.language_model = build_decoder(config.text_config, ctx)

    def embed_images(self, *, pixel_values: Tensor) -> list[Tensor]:
        """`[N, 3, height, width]` pixels to N tensors `[rows, hidden]`."""
        states = tower_features(self.vision_tower, pixel_values)
        features = select_features(states, self.select_strategy)
        return list(self.multi_modal_projector(features))
