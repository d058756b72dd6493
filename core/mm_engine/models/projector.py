"""From a tower's features to the decoder's width."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN


class Projector(nn.Module):
    """Two linear layers from the tower's width (times the feature layers) to the decoder's.

    Reads `vision_config.hidden_size`, `text_config.hidden_size`, `vision_feature_layer`,
    `projector_hidden_act` and `multimodal_projector_bias` of the model's config. The parameters
    are `linear_1` and `linear_2`, as checkpoints name them.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        layers = config.vision_feature_layer
        num_layers = 1 if isinstance(layers, int) else len(layers)
        width, hidden = config.vision_config.hidden_size, config.text_config.hidden_size
        bias = config.multimodal_projector_bias
        self.linear_1 = nn.Linear(width * num_layers, hidden, bias=bias)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden, hidden, bias=bias)

    def forward(self, features: Tensor) -> Tensor:
        """`[N, rows, width * num_layers]` to `[N, rows, hidden]`."""
        projected: Tensor = self.linear_2(self.act(self.linear_1(features)))
        return projected
