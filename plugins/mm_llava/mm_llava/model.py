"""LLaVA-1.5: a vision tower, a two-layer projector and a text decoder (arXiv:2310.03744)."""

from __future__ import annotations

from typing import Any

import torch
from mm_engine.models import SupportsVision, build_decoder, build_vision_tower, tower_features
from mm_engine.plugins import ModelContext
from torch import Tensor, nn
from transformers.activations import ACT2FN


class MultiModalProjector(nn.Module):
    """Two linear layers from the tower's width (times the feature layers) to the decoder's."""

    def __init__(self, config: Any, num_layers: int) -> None:
        super().__init__()
        width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        bias = config.multimodal_projector_bias
        self.linear_1 = nn.Linear(width * num_layers, hidden, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden, hidden, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """`[N, rows, width * num_layers]` to `[N, rows, hidden]`."""
        projected: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return projected


class LlavaForConditionalGeneration(SupportsVision, nn.Module):
    """The model as mm-engine runs it. `embed_images` is all that is LLaVA's own."""

    def __init__(self, ctx: ModelContext) -> None:
        super().__init__()
        config: Any = ctx.hf_config
        layers = config.vision_feature_layer
        num_layers = 1 if isinstance(layers, int) else len(layers)
        self.vision_tower = build_vision_tower(config.vision_config, layers)
        self.drop_first = config.vision_feature_select_strategy == "default"
        self.multi_modal_projector = MultiModalProjector(config, num_layers)
        self.language_model = build_decoder(config.text_config, ctx)

    def embed_images(self, *, pixel_values: Tensor) -> list[Tensor]:
        """`[N, 3, height, width]` pixels to N tensors `[rows, hidden]`."""
        states = tower_features(self.vision_tower, pixel_values)
        if self.drop_first:
            states = [state[:, 1:] for state in states]
        return list(self.multi_modal_projector(torch.cat(states, dim=-1)))
