"""LLaVA-NeXT: LLaVA-1.5's parts, over an image's tiles (arXiv:2310.03744, version 1.6)."""

from __future__ import annotations

from typing import Any

import torch
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

from mm_llava_next.counts import Layout, layout


class LlavaNextForConditionalGeneration(SupportsVision, nn.Module):
    """The model as mm-engine runs it. `embed_images` and `pack` are all that is its own."""

    def __init__(self, ctx: ModelContext) -> None:
        super().__init__()
        config: Any = ctx.hf_config
        self.config = config
        self.vision_tower = build_vision_tower(config.vision_config, config.vision_feature_layer)
        self.multi_modal_projector = Projector(config)
        self.image_newline = nn.Parameter(torch.empty(config.text_config.hidden_size))
        self.language_model = build_decoder(config.text_config, ctx)

    def embed_images(
        self, *, pixel_values: Tensor | list[Tensor], image_sizes: Tensor
    ) -> list[Tensor]:
        """N images, as pictures `[1 + tiles, 3, side, side]` and sizes `[N, 2]` (height, width),
        to N tensors `[num_tokens, hidden]`; the tower sees all pictures at once.
        """
        states = tower_features(self.vision_tower, torch.cat(list(pixel_values)))
        features = select_features(states, self.config.vision_feature_select_strategy)
        projected = self.multi_modal_projector(features)
        layouts = [layout(self.config, *size) for size in image_sizes.tolist()]
        images = projected.split([len(pictures) for pictures in pixel_values])
        return [self.pack(rows, place) for rows, place in zip(images, layouts, strict=True)]

    def pack(self, features: Tensor, place: Layout) -> Tensor:
        """`[1 + tiles, side * side, hidden]` of one image to `[num_tokens, hidden]`.

        The whole image comes first; then the tiles side by side, without the padding, line by
        line and each line ended by `image_newline`.
        """
        whole, tiles = features[0], features[1:]
        grid = tiles.view(place.rows, place.columns, place.side, place.side, -1)
        lines = grid.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        lines = lines.narrow(0, place.top, place.height).narrow(1, place.left, place.width)
        newline = self.image_newline.expand(place.height, 1, -1)
        return torch.cat([whole, torch.cat([lines, newline], dim=1).flatten(0, 1)])
