"""Vision towers: transformers' own modules, built only as deep as their features are read."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from mm_engine.errors import StartupError


def build_vision_tower(config: Any, upto_layer: int | list[int]) -> nn.Module:
    """transformers' tower for `config` (a `vision_config`) without what lies past `upto_layer`.

    `upto_layer` counts as in `hidden_states`: 0 is the embeddings, -1 the last layer, -2 the one
    before. Pooling heads and final norms, which no `hidden_states` pass through, are left out.

    Raises:
        StartupError: `upto_layer` is out of the tower's range.
    """
    layers = resolve_layers(config, upto_layer)
    config = copy.deepcopy(config)
    config.num_hidden_layers = max(layers)
    config.vision_use_head = False
    dtype = torch.get_default_dtype()  # the loader sets it; else the config's own would win
    tower: Any = AutoModel.from_config(config, attn_implementation="sdpa", dtype=dtype)
    if hasattr(tower, "post_layernorm"):
        tower.post_layernorm = nn.Identity()
    tower.feature_layers = layers
    built: nn.Module = tower.eval().requires_grad_(False)
    return built


def resolve_layers(config: Any, layers: int | list[int]) -> list[int]:
    """Layers as indices from 0 (the embeddings) to `num_hidden_layers`.

    Raises:
        StartupError: a layer is out of range.
    """
    num_states = config.num_hidden_layers + 1
    picked = [layers] if isinstance(layers, int) else list(layers)
    for layer in picked:
        if not -num_states <= layer < num_states:
            raise StartupError(
                f"vision feature layer is out of range: {layer} of a tower with "
                f"{num_states} hidden states. Correct vision_feature_layer in config.json."
            )
    return [layer % num_states for layer in picked]


def tower_features(tower: Any, pixel_values: Tensor) -> list[Tensor]:
    """`[N, patches, hidden]` of each layer that `build_vision_tower` was asked for, in order."""
    layers: list[int] = tower.feature_layers
    pixel_values = pixel_values.to(next(tower.parameters()).dtype)
    with torch.no_grad():
        if layers == [tower.config.num_hidden_layers]:
            return [tower(pixel_values).last_hidden_state]
        states = tower(pixel_values, output_hidden_states=True).hidden_states
    return [states[layer] for layer in layers]
