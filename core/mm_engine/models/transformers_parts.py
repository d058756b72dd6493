"""What stands in for parts of transformers' causal models: their heads, linear layers, backbone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.utils.generic import ModelOutput

from mm_engine.models.layers import Linear
from mm_engine.models.transformers_attention import Unsupported


class HandOver:
    """Takes the place of a backbone's `forward`, to hand on hidden states without running it.

    So it is the causal model's own code that makes logits of them.
    """

    def __init__(self, backbone: Any) -> None:
        self.forward = backbone.forward
        self.hidden: Tensor | None = None
        self.output_class: type[ModelOutput] | None = None  # known once it has run
        backbone.forward = self

    def __call__(self, *args: Any, **keywords: Any) -> Any:
        """What the backbone returns; or the hidden states `[1, N, hidden]` in the same form."""
        if self.hidden is not None and self.output_class is not None:
            return self.output_class(last_hidden_state=self.hidden)
        output = self.forward(*args, **keywords)
        self.output_class = type(output)
        return output

    @contextmanager
    def of(self, hidden: Tensor) -> Iterator[None]:
        """Hand on `hidden` while this lasts."""
        self.hidden = hidden
        try:
            yield
        finally:
            self.hidden = None


class TiedHead(nn.Module):
    """A head without weights: it multiplies by the embeddings'."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so as not to own its weights a second time

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., hidden]` to `[..., vocab]`."""
        weight = self._embedding[0].weight
        assert isinstance(weight, Tensor)
        return linear(hidden, weight)


class CalledLinear(Linear):
    """A linear layer of transformers', packed like ours, for code that may ask for its sizes."""

    def __init__(self, plain: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(plain.in_features, plain.out_features, bias=plain.bias is not None)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        for name, parameter in plain.named_parameters():
            self.register_parameter(name, parameter)


def path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    """The path of a module below `model`.

    Raises:
        Unsupported: it isn't there.
    """
    for path, module in model.named_modules():
        if module is wanted and path:
            return path
    raise Unsupported("no backbone, embeddings and head apart from each other")


def keep_float32(causal: Any) -> None:
    """Widen the parameters that transformers keeps in float32 whatever dtype a model is run in."""
    patterns = causal._get_dtype_plan(torch.get_default_dtype())
    kept = re.compile("|".join(re.escape(name).replace(r"\*", ".*") for name in patterns) or "(?!)")
    for name, tensor in [*causal.named_parameters(), *causal.named_buffers()]:
        if kept.search(name):
            tensor.data = tensor.data.float()
