"""What stands in for parts of transformers' causal models: their heads, linear layers, backbone."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AutoModelForImageTextToText
from transformers.utils.generic import ModelOutput

from mm_engine.config import Piece
from mm_engine.models.layers import Linear
from mm_engine.models.transformers_attention import Unsupported


class HandOver:
    """Takes the place of a backbone's `forward`, to hand on hidden states without running it.

    So it is the code around the backbone, transformers' own, that makes logits of them.
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


class _Handed(tuple[Tensor]):
    """Hidden states in place of any class of output: whatever else is asked for is None."""

    def __getattr__(self, name: str) -> Tensor | None:
        return self[0] if name == "last_hidden_state" else None


class Composite:
    """transformers' whole model of images and text, there for its way from hidden states to logits.

    It is built without memory (on the meta device); the head that it runs is the backbone's, which
    has a bias if the model's own has one.
    """

    def __init__(self, model: Any, head_path: str) -> None:
        self.model, self.head_path = model, head_path
        self.has_bias = getattr(model.get_submodule(head_path), "bias", None) is not None
        self.handed = _Handed()
        model.model.forward = lambda *_, **__: self.handed

    def logits(self, hidden: Tensor, head: nn.Module) -> Tensor:
        """`[N, hidden]` to `[N, vocab]`, through `head`."""
        self.model.set_submodule(self.head_path, head)
        self.handed = _Handed([hidden[None]])
        try:
            logits: Tensor = self.model(inputs_embeds=hidden[None], use_cache=False).logits[0]
        finally:
            self.handed = _Handed()
        return logits


def composite_of(hf_config: Any, text_config: Any) -> Composite | None:
    """The model that transformers has for a whole checkpoint, if its head is the model's own.

    None where the text backbone's causal model is what makes logits in transformers: it is the
    checkpoint itself, or a part of the composite model, or transformers knows no composite.
    """
    if (
        hf_config is text_config
        or type(hf_config) not in AutoModelForImageTextToText._model_mapping
    ):
        return None
    with torch.device("meta"):
        model: Any = AutoModelForImageTextToText.from_config(copy.deepcopy(hf_config)).eval()
    base, head_path = getattr(model, "model", None), path_of(model, model.get_output_embeddings())
    # A head in a part of the model is the causal model's, which adds what it adds.
    return Composite(model, head_path) if base is not None and "." not in head_path else None


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

    def cut(self, *, rows: Piece | None = None, columns: Piece | None = None) -> None:
        """Hold these rows or columns only, uninitialised: the weights are loaded later."""
        self.rows, self.columns = rows, columns
        shape = [self.out_features, self.in_features]
        for dim, piece in ((0, rows), (1, columns)):
            if piece is not None:
                shape[dim] = piece.length
        weight, bias = self.weight, self.bias
        self.weight = nn.Parameter(weight.new_empty(shape), requires_grad=False)
        if bias is not None:
            self.bias = nn.Parameter(bias.new_empty(shape[0]), requires_grad=False)


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
