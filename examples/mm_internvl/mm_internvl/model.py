"""The model: InternViT, pixel shuffle, a projector and a text decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.activations import ACT2FN

from mm_engine.models import SupportsVision, build_decoder
from mm_engine.plugins import ModelContext


class InternVLProjector(nn.Module):
    """A norm and two linear layers, from shuffled patches to the decoder's width."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        width = config.vision_config.hidden_size * int(1 / config.downsample_ratio) ** 2
        hidden = config.text_config.hidden_size
        self.layer_norm = nn.LayerNorm(width)
        self.linear_1 = nn.Linear(width, hidden)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden, hidden)

    def forward(self, features: Tensor) -> Tensor:
        """`[num_pictures, rows, width]` to `[num_pictures, rows, hidden]`."""
        return self.linear_2(self.act(self.linear_1(self.layer_norm(features))))


def pixel_shuffle(features: Tensor, ratio: float) -> Tensor:
    """Squares of patches become one row each, all in reading order: `[N, rows, width]`."""
    factor = int(1 / ratio)
    num_pictures, num_patches, width = features.shape
    side = int(num_patches**0.5) // factor
    squares = features.view(num_pictures, side, factor, side, factor, width)
    return squares.transpose(2, 3).reshape(num_pictures, side * side, factor * factor * width)


class InternVLForConditionalGeneration(SupportsVision, nn.Module):
    """Attributes are named as in transformers' `InternVLModel`."""

    def __init__(self, ctx: ModelContext) -> None:
        super().__init__()
        config: Any = ctx.hf_config
        self.layer = config.vision_feature_layer
        self.ratio = config.downsample_ratio
        # All of transformers' tower: its last layer counts after the final norm, the others don't.
        self.vision_tower = AutoModel.from_config(
            config.vision_config, attn_implementation="sdpa", dtype=torch.get_default_dtype()
        )
        self.vision_tower.eval().requires_grad_(False)
        self.multi_modal_projector = InternVLProjector(config)
        self.language_model = build_decoder(config.text_config, ctx)

    def embed_images(self, *, pixel_values: Tensor | list[Tensor]) -> list[Tensor]:
        """N images' pictures `[num_pictures, 3, side, side]` to N of `[num_tokens, hidden]`."""
        pictures = torch.cat(list(pixel_values)).to(self.vision_tower.dtype)
        found = self.vision_tower(pictures, output_hidden_states=self.layer != -1)
        states = found.last_hidden_state if self.layer == -1 else found.hidden_states[self.layer]
        features = pixel_shuffle(states[:, 1:], self.ratio)  # without the class token
        projected = self.multi_modal_projector(features)
        images = projected.split([len(image) for image in pixel_values])
        return [image.flatten(0, 1) for image in images]
