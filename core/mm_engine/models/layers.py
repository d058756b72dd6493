"""Layers with the weights that one device step reads: linear (fused and packed), norm, rotary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from mm_engine_kernels import ops, reference
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mm_engine.config import Piece
from mm_engine.errors import StartupError

if TYPE_CHECKING:
    from mm_engine.models.quantization import LayerQuantizer


def length_of(size: int | Piece) -> int:
    """How much of it this process holds."""
    return size.length if isinstance(size, Piece) else size


class Linear(nn.Module):
    """A linear layer, possibly several fused into one: `parts` maps each one's name to its rows.

    A checkpoint's `<parent>.<part>.weight` is loaded into that part's rows of `weight`.

    A size may be a `Piece`: then this process holds that piece of the weight. With a piece of the
    inputs, what the processes compute is summed.
    """

    def __init__(
        self,
        in_features: int | Piece,
        out_features: int | Piece | Mapping[str, int | Piece],
        *,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.parts: dict[str, int | Piece] = {}
        self.columns = in_features if isinstance(in_features, Piece) else None
        self.rows = out_features if isinstance(out_features, Piece) else None
        if isinstance(out_features, Mapping):
            self.parts = dict(out_features)
            rows = sum(length_of(part) for part in out_features.values())
        else:
            rows = length_of(out_features)
        self.weight = nn.Parameter(torch.empty(rows, length_of(in_features)), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(rows), requires_grad=False) if bias else None
        self.packed: reference.Packed | None = None
        self._unpacked: reference.Packed | None = None  # what `packed` was
        self.quantizer: LayerQuantizer | None = None  # None: the weight stays in its dtype
        self.quantized: tuple[Tensor, ...] = ()
        self.num_packed = 0  # numbers of the weight that was given up

    def pack(self, *, in_place: bool = False) -> None:
        """Quantise the weight, or lay it out for the device's kernels; once it is whole.

        The plain weight is given up: memory holds one copy. Without a quantizer it stays where
        there is no such layout. With `in_place` the layout may lie in the plain weight's memory.

        Raises:
            StartupError: the weight can't be quantised.
        """
        plain = self.weight
        if self.quantizer is not None:
            if not self.quantized:
                self.quantized = self.quantizer.quantize(plain.detach())
            if plain.numel():  # as it is where what it was quantised to was kept
                self._give_up(plain)
        elif self.packed is None:
            if self._unpacked is not None:
                # Where it was: recorded steps go on reading there.
                self._unpacked.refill(plain.detach())
                self.packed, self._unpacked = self._unpacked, None
            else:
                self.packed = ops.pack_linear(plain.detach(), in_place=in_place)
            if self.packed is not None:
                self._give_up(plain)

    def unpack(self) -> None:
        """Have the plain weight again, to load into; a quantised one can't be had."""
        if self.packed is not None:
            self.weight = nn.Parameter(self.packed.weight(), requires_grad=False)
            self.packed, self._unpacked = None, self.packed

    def _give_up(self, plain: Tensor) -> None:
        self.num_packed = plain.numel()
        self.weight = nn.Parameter(torch.empty(0, dtype=plain.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`: of this process's pieces of them."""
        if self.columns is None or self.columns.shard.size == 1:
            return self._product(x, self.bias)
        summed = self.columns.shard.group.all_reduce(self._product(x, None))
        return summed if self.bias is None else summed + self.bias

    def _product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.quantizer is not None and self.quantized:
            return self.quantizer.linear(x, self.quantized, bias)
        if self.packed is not None:
            return self.packed(x, bias)
        return ops.linear(x, self.weight, bias)


class RMSNorm(nn.Module):
    """Root-mean-square norm, alone or after adding to the residual stream."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size), requires_grad=False)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """`[T, hidden]` to `[T, hidden]`."""
        return ops.rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """The norm of `residual + x`, and that sum."""
        return ops.add_rms_norm(x, residual, self.weight, self.eps)


class RotaryTable(nn.Module):
    """Cosines and sines of every position, made once by transformers' formulas for the config.

    Raises:
        StartupError: the config asks for a scaling that depends on each prompt's own length.
    """

    kinds: ClassVar[tuple[str, ...]] = ("default", "linear", "yarn", "llama3")

    def __init__(self, config: Any, head_dim: int, max_len: int) -> None:
        super().__init__()
        parameters = config.rope_parameters
        kind = parameters.get("rope_type", "default")
        if kind == "default":
            exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
            inv_freq, scaling = 1.0 / (parameters["rope_theta"] ** exponents), 1.0
        elif kind in self.kinds:
            inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        else:
            raise StartupError(
                f"rope scaling of this checkpoint is not supported: {kind}. "
                f"Supported: {', '.join(self.kinds)}."
            )
        angles = torch.outer(torch.arange(max_len, dtype=torch.float32), inv_freq.float())
        angles = torch.cat((angles, angles), dim=-1)
        # Not in a state dict: it follows from the config.
        self.register_buffer("cos", angles.cos() * scaling, persistent=False)
        self.register_buffer("sin", angles.sin() * scaling, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines `[T, head_dim]` of `positions` `[T]`."""
        assert isinstance(self.cos, Tensor) and isinstance(self.sin, Tensor)
        return (
            ops.gather_rows(self.cos, positions, dtype),
            ops.gather_rows(self.sin, positions, dtype),
        )


def pack_linears(model: nn.Module) -> None:
    """Pack every `Linear` of `model` for the device that it is on.

    In the memory of its weight, unless others use that: pages that the process has are had sooner
    than new ones.
    """
    alone = alone_in_memory(model)
    for module in model.modules():
        if isinstance(module, Linear):
            module.pack(in_place=alone(module.weight))


def alone_in_memory(model: nn.Module) -> Callable[[Tensor], bool]:
    """Tells of a parameter of `model` whether no other, nor a buffer, lies in its memory."""
    users = Counter(
        tensor.untyped_storage().data_ptr()
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None
    )
    return lambda tensor: users[tensor.untyped_storage().data_ptr()] == 1
