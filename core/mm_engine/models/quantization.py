"""Which layers of a model are quantised, and when: each as soon as its weight is whole."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch import Tensor, nn

from mm_engine.errors import StartupError
from mm_engine.models.layers import Linear, length_of
from mm_engine.models.packed_cache import PackedCache
from mm_engine.models.quantization_schemes import Scheme
from mm_engine.models.weights import checkpoint_names

logger = logging.getLogger(__name__)


def decoder_linears(model: nn.Module) -> Iterator[tuple[str, Linear, bool]]:
    """The linear layers of a model's text backbone, by name, and whether each is its head.

    The vision tower, the projector and the embeddings aren't among them, as in vLLM: they are
    small, or what they make is read by all that follows.
    """
    for name, module in model.named_modules():
        if hasattr(module, "untie"):  # a decoder, ours or transformers'
            for path, part in module.named_modules(prefix=name):
                if isinstance(part, Linear):
                    yield path, part, part is module.lm_head


class LayerQuantizer:
    """What one layer is quantised with; `Linear.pack` and `Linear.forward` call it.

    `tensor_names` are the checkpoint's tensors that make up the layer's weight, in order of their
    rows, with the number of these.
    """

    def __init__(self, scheme: Scheme, tensor_names: dict[str, int]) -> None:
        self.tensor_names = tensor_names
        self.scheme = scheme

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What stands for `weight`.

        Raises:
            StartupError: it holds NaN or infinity, which no scale can be found for.
        """
        ends = torch.stack(torch.aminmax(weight))  # many times as fast as a look at each number
        if not bool(ends.isfinite().all()):
            finite = weight.isfinite().all(1)
            names, sizes = self.tensor_names, list(self.tensor_names.values())
            parts = zip(names, finite.split(sizes), strict=True)
            broken = [name for name, rows in parts if not bool(rows.all())]
            raise StartupError(
                f"weights hold NaN or infinity and can't be quantised: {', '.join(broken)}. "
                "Fetch the checkpoint again."
            )
        return self.scheme.quantize(weight)

    def linear(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        out = self.scheme.linear(x.reshape(-1, x.shape[-1]), packed, bias)
        return out.view(*x.shape[:-1], -1)


class Quantization:
    """Has the layers of a model's text backbone quantised with a scheme, each once it is whole.

    A head that isn't tied to the embeddings is quantised with the scheme's own one for heads, if it
    has any.

    Raises:
        StartupError: the scheme is for none of the layers.
    """

    def __init__(self, model: nn.Module, scheme: Scheme) -> None:
        self.scheme, self.model = scheme, model
        self.layers: list[Linear] = []
        self.by_name: dict[str, Linear] = {}
        self.cache: PackedCache | None = None  # where to keep what comes of it
        self.kept: list[str] = []  # for each layer that stays as it is: why
        public = checkpoint_names(model)
        for name, layer, is_head in decoder_linears(model):
            own_scheme = scheme.head if is_head else scheme
            if own_scheme is None:
                continue
            reason = own_scheme.refusal(*layer.weight.shape)
            if reason is not None:
                self.kept.append(reason)
                continue
            parent, own = name.rpartition(".")[::2]
            parts = layer.parts or {own: len(layer.weight)}
            names = {
                public(f"{parent}.{part}.weight"): length_of(rows) for part, rows in parts.items()
            }
            layer.quantizer = LayerQuantizer(own_scheme, names)
            self.layers.append(layer)
            self.by_name[name] = layer
        if not self.layers:
            why = self.kept[0] if self.kept else "its text backbone isn't built of our layers"
            raise StartupError(
                f"no layer of {type(model).__name__} can be quantised to {scheme.name}: {why}. "
                "Use another --quantization, or none."
            )

    def use_cache(self, folder: Path, key: str) -> None:
        """Take what an earlier start has kept there, else keep there what comes of this one."""
        cache = PackedCache(folder, key, self.by_name)
        if not cache.restore():
            self.cache = cache

    def finish(self, *, progress: bool) -> None:
        """Quantise what loading left, with a progress bar on stderr, and log what came of it."""
        left = [layer for layer in self.layers if layer.weight.numel()]
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=Console(stderr=True),
            disable=not (progress and left),
        ) as bar:
            for layer in bar.track(left, description="Quantising weights"):
                layer.pack()
        if self.cache is not None:
            self.cache.store()
        before = sum(layer.num_packed * layer.weight.element_size() for layer in self.layers)
        after = sum(part.nbytes for layer in self.layers for part in layer.quantized)
        others = {layer.quantizer.scheme.name for layer in self.layers if layer.quantizer}
        head = "".join(f" (the head to {name})" for name in others - {self.scheme.name})
        kept = f"; {len(self.kept)} stay as they are ({', '.join(dict.fromkeys(self.kept))})"
        logger.info(
            "Quantised %d linear layers to %s%s: %.4g MiB instead of %.4g%s.",
            len(self.layers),
            self.scheme.name,
            head,
            after / 2**20,
            before / 2**20,
            kept if self.kept else "",
        )
