"""Vision towers: transformers' own modules, built only as deep as their features are read.

`tower_features.json` lists the types that are known to end in `post_layernorm` and a pooling head;
those are cut. A tower of another type may hold anything behind its last layer, so it stays whole.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from mm_engine.errors import StartupError
from mm_engine.models.encoder_attention import IMPLEMENTATION


def build_vision_tower(config: Any, upto_layer: int | list[int]) -> nn.Module:
    """transformers' tower for `config` (a `vision_config`), to be read by `tower_features`.

    `upto_layer` counts as in `hidden_states`: 0 is the embeddings, -1 the last layer, -2 the one
    before. Towers of the types listed in `tower_features.json` are built without what lies past
    the layers that are read: later layers, the final norm (which no `hidden_states` pass through)
    and the pooling head. Any other type that transformers' `AutoModel` builds is built whole; it
    must take `pixel_values` and return `hidden_states`.

    Raises:
        StartupError: `upto_layer` is out of the tower's range.
    """
    layers = resolve_layers(config, upto_layer)
    config = copy.deepcopy(config)
    known = config.model_type in _known_towers()
    if known:
        config.num_hidden_layers = max(layers)
        config.vision_use_head = False
    dtype = torch.get_default_dtype()  # the loader sets it; else the config's own would win
    attention = IMPLEMENTATION if known else "sdpa"  # others may ask for more than they say
    tower: Any = AutoModel.from_config(config, attn_implementation=attention, dtype=dtype)
    if known:
        tower.post_layernorm = nn.Identity()
    tower.feature_layers = layers
    # A cut tower's output is its last hidden state; of a whole one, that is for the tower to say.
    tower.ends_with_features = known and layers == [max(layers)]
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
    """`[N, patches, hidden]` of each layer that `build_vision_tower` was asked for, in order.

    `pixel_values` are `[N, 3, height, width]` in any floating dtype; they become the tower's. The
    class token counts as a patch where the tower has one.
    """
    layers: list[int] = tower.feature_layers
    pixel_values = pixel_values.to(next(tower.parameters()).dtype)
    with torch.no_grad():
        if tower.ends_with_features:
            return [tower(pixel_values).last_hidden_state]
        states = tower(pixel_values, output_hidden_states=True).hidden_states
    return [states[layer] for layer in layers]


def select_features(states: Sequence[Tensor], strategy: str) -> Tensor:
    """What a projector takes of `tower_features`: `[N, rows, width * num_layers]`.

    The layers lie side by side; the strategy `default` drops the first row (the class token of a
    tower that has one, a patch of another), `full` keeps all.
    """
    features = torch.cat(list(states), dim=-1)
    return features[:, 1:] if strategy == "default" else features


def num_tower_rows(config: Any, strategy: str) -> int:
    """Rows that `select_features` gives of one picture through the tower of a `vision_config`.

    The tower sees `image_size` pixels square in patches of `patch_size` (floor division), some
    types with a class token before them: `tower_features.json` says which.
    Source: `get_image_features` of transformers' models.

    Raises:
        StartupError: the type isn't listed there (other towers count in their own ways), or its
            sizes leave no patch.
    """
    table = _known_towers()
    if config.model_type not in table:
        raise StartupError(
            f"rows of this type of vision tower aren't known to num_tower_rows: "
            f"{config.model_type}. Count them in the plugin."
        )
    image, patch = config.image_size, config.patch_size
    if type(image) is not int or type(patch) is not int or not 1 <= patch <= image:
        raise StartupError(
            f"image_size and patch_size of the vision tower leave no patch: {image!r} and "
            f"{patch!r} pixels. Correct vision_config in config.json."
        )
    num_rows: int = (image // patch) ** 2
    num_rows += table[config.model_type]["class_token"]
    return num_rows - (strategy == "default")


def _known_towers() -> dict[str, dict[str, bool]]:
    """What isn't said by the configs of the towers that are cut, by type."""
    text = resources.files(__package__).joinpath("tower_features.json").read_text()
    table: dict[str, dict[str, bool]] = json.loads(text)
    return table
