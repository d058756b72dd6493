"""torch's own layers, computed with packed weights: an encoder's, whoever wrote it.

A module stays where it is and changes its class, so that hooks on it and references to it hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

from mm_engine_kernels import ops, reference
from torch import Tensor, nn

from mm_engine.models.layers import alone_in_memory


class PackedWeight(nn.Module):
    """What makes a packed class of one of torch's; memory holds the packed weight alone.

    Whoever reads `weight` gets the plain one, made anew; a state dict holds it too. `parameters()`
    has an empty one in its place.
    """

    plain: ClassVar[type[nn.Module]]
    packed: reference.Packed
    shape: tuple[int, ...]  # of the plain weight

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Whether this class computes what a module of the plain class does."""
        return True

    @classmethod
    def adopt(cls, module: Any, packed: reference.Packed) -> None:
        """Have a module of the plain class become one of this; `packed` is its weight's matrix."""
        weight = module.weight
        module.packed, module.shape = packed, tuple(weight.shape)
        empty = nn.Parameter(weight.new_empty(0), weight.requires_grad)
        module._parameters["weight"] = empty
        module.__class__ = cls

    def unpack(self) -> None:
        """Be of torch's class again, with the plain weight."""
        module: Any = self
        module._parameters["weight"] = module.weight
        del module.packed, module.shape
        module.__class__ = self.plain

    def takes(self, x: Tensor) -> bool:
        """Whether the kernels compute on `x`; torch says what is wrong with others."""
        empty = self._parameters["weight"]
        assert empty is not None
        return x.dtype == empty.dtype and x.device == empty.device

    def __getattr__(self, name: str) -> Any:
        if name == "weight":
            empty = self._parameters["weight"]
            assert empty is not None
            return nn.Parameter(self.packed.weight().view(self.shape), empty.requires_grad)
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, *args: Any, **keywords: Any) -> None:
        self.unpack()
        self._load_from_state_dict(*args, **keywords)  # torch's own, by now

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.unpack()  # a move to where there may be no such layout
        return self._apply(fn, recurse)


class PackedLinear(PackedWeight, nn.Linear):
    """Any `nn.Linear`."""

    plain = nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return self.packed(x, self.bias) if self.takes(x) else super().forward(x)


class PackedPatches(PackedWeight, nn.Conv2d):
    """An `nn.Conv2d` whose windows lie side by side: a linear layer of each patch's pixels."""

    plain = nn.Conv2d

    @classmethod
    def fits(cls, module: Any) -> bool:
        """Its windows don't overlap, and there is nothing around or between them."""
        side_by_side = module.stride == module.kernel_size and module.dilation == (1, 1)
        return side_by_side and module.padding in ("valid", (0, 0)) and module.groups == 1

    def forward(self, x: Tensor) -> Tensor:
        """`[N, in, height, width]` to `[N, out, rows, columns]`."""
        if not self.takes(x) or x.dim() != 4 or x.shape[1] != self.in_channels:
            return super().forward(x)
        rows, columns = (size // side for size, side in zip(x.shape[2:], self.stride, strict=True))
        if not len(x) * rows * columns:
            return super().forward(x)
        height, width = self.stride
        x = x[..., : rows * height, : columns * width]
        x = x.reshape(len(x), self.in_channels, rows, height, columns, width)
        patches = x.permute(0, 2, 4, 1, 3, 5).reshape(len(x), rows * columns, -1)
        out = self.packed(patches, self.bias)
        return out.transpose(1, 2).unflatten(2, (rows, columns)).contiguous()


class PackedEmbedding(PackedWeight, nn.Embedding):
    """The embeddings of tokens that are a decoder's head as well."""

    plain = nn.Embedding

    @classmethod
    def fits(cls, module: Any) -> bool:
        """It changes no row as it looks it up."""
        return module.max_norm is None

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[...]` ids to `[..., hidden]`."""
        rows = self.packed.weight_rows(input_ids.reshape(-1))
        return rows.view(*input_ids.shape, self.shape[1])

    def logits(self, hidden: Tensor) -> Tensor:
        """`[N, hidden]` to `[N, vocab]`."""
        return self.packed(hidden)


def pack_embedding(embedding: nn.Module) -> None:
    """Pack embeddings that nobody else has the weight of, in their memory if that will do."""
    if type(embedding) is not nn.Embedding or not PackedEmbedding.fits(embedding):
        return
    packed = ops.pack_linear(embedding.weight.detach(), in_place=True)
    if packed is not None:
        PackedEmbedding.adopt(embedding, packed)


def pack_encoders(model: nn.Module) -> None:
    """Pack what isn't in a decoder, whose layers are ours, for the device that it is on.

    A weight whose memory somebody else reads stays as it is, as does one that its module doesn't
    keep as a parameter, and those that torch's encoder layer reads itself.
    """
    alone = alone_in_memory(model)
    kinds: dict[type[nn.Module], type[PackedWeight]] = {
        kind.plain: kind for kind in (PackedLinear, PackedPatches)
    }
    for module in list(_outside_decoders(model)):
        kind, weight = kinds.get(type(module)), module._parameters.get("weight")
        if kind is None or weight is None or not alone(weight) or not kind.fits(module):
            continue
        if "forward" in vars(module) or not weight.numel():  # somebody's own; nothing to gain
            continue
        # Not in its place: a model that others wrote may hold it by other ways as well.
        packed = ops.pack_linear(weight.detach().flatten(1))
        if packed is not None:
            kind.adopt(module, packed)


def _outside_decoders(model: nn.Module) -> Iterator[nn.Module]:
    if hasattr(model, "untie") or isinstance(model, nn.TransformerEncoderLayer):
        return
    yield model
    for child in model.children():
        yield from _outside_decoders(child)
