"""The interface between the engine and a model that a plugin brings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.models.weights import WeightReport, load_into


class SupportsVision:
    """Mixin for an `nn.Module` that sees images. Set `self.language_model`, write `embed_images`.

    The class is built as `cls(ctx)` with parameters left uninitialised; weights come afterwards.
    Whatever of the methods below doesn't fit a model can be overridden.
    """

    language_model: Any  # what `build_decoder` returns

    #: Renames of checkpoint names, first match wins: prefix -> prefix of a parameter here. These
    #: cover the three layouts in circulation: the Hub's, transformers 5's in memory, and what its
    #: `save_pretrained` writes. A model extends them: `{"connector.": "projector.", **…}`.
    weight_prefixes: ClassVar[dict[str, str]] = {
        "language_model.model.": "language_model.",
        "model.language_model.": "language_model.",
        "lm_head.": "language_model.lm_head.",
        "model.vision_tower.vision_model.": "vision_tower.",
        "vision_tower.vision_model.": "vision_tower.",
        "model.": "",
    }

    #: To be written: for each image its rows `[num_tokens, hidden]` in the dtype of `ctx`, as many
    #: as its placeholder tokens and in their order. One keyword for each tensor that the mapper
    #: returns: equal shapes arrive stacked `[num_images, ...]`, unequal ones as a list of tensors.
    #:
    #: Beside answers that stream, a call may run in another thread, rest after any submodule has
    #: returned while `forward` computes a step, and go on, or be ended there by an exception. So
    #: it shares nothing that it writes to with `forward`, holds no lock and no global setting
    #: (default dtype, backend flags) over a submodule's call, and catches no `BaseException`.
    embed_images: Callable[..., list[Tensor]]

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attn_metadata: AttentionMetadata,
        *,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        """Run the decoder over one step's tokens: `[num_tokens]` ids to `[num_tokens, hidden]`."""
        hidden: Tensor = self.language_model(
            input_ids, positions, attn_metadata, inputs_embeds=inputs_embeds
        )
        return hidden

    def embed_tokens(self, input_ids: Tensor) -> Tensor:
        """Text embeddings `[num_tokens, hidden]`."""
        embeddings: Tensor = self.language_model.embed_tokens(input_ids)
        return embeddings

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """Logits `[num_rows, vocab]` of the rows that are sampled from."""
        logits: Tensor = self.language_model.compute_logits(hidden)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> WeightReport:
        """Copy `(checkpoint name, tensor)` pairs into the parameters, renaming by prefix.

        A tensor that no parameter is named after is left out; a parameter without a tensor ends
        startup. To change tensors on the way, override this and hand on other pairs.
        """
        assert isinstance(self, nn.Module)
        with torch.no_grad():
            return load_into(self, weights, self.weight_prefixes)
