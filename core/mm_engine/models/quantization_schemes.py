"""Schemes of quantised weights: one class for each, and the one place that looks at the device.

`make_scheme` picks the class whose kernels run there. What all of them are held to is
`mm_engine_kernels.quantized`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from mm_engine_kernels import ops, quantized
from torch import Tensor

from mm_engine.errors import StartupError

#: Up to so many rows of activations PyTorch's int8 kernels are used, which read each weight once
#: for a few rows; from there on, widening the weight costs less than it saves.
MAX_INT8_ROWS = 16
MAX_SLAB = 1 << 24  # numbers that are quantised at once
GROUPS = (128, 64, 32)  # columns that share a scale of int4; the first that divides the width


class Scheme(Protocol):
    """How one kind of quantised layer is stored and multiplied, on one device."""

    name: str
    device: torch.device  # where `quantize` puts what it makes

    @property
    def head(self) -> Scheme | None:
        """How a model's head is quantised; None: it stays as it is."""
        ...

    def refusal(self, rows: int, columns: int) -> str | None:
        """Why a weight `[rows, columns]` can't be quantised; None: it can."""
        ...

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """What stands for `weight` `[N, K]`, on the device; `linear` gets it back."""
        ...

    def linear(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        """`[M, K]` to `[M, N]` in x's dtype; `bias` is `[N]`."""
        ...


class BiasAfter(ABC):
    """A scheme whose kernels don't add the bias, and that leaves heads alone."""

    head: Scheme | None = None

    def linear(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        """See `Scheme.linear`."""
        out = self.product(x, packed)
        return out if bias is None else out + bias

    @abstractmethod
    def product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """`Scheme.linear` without the bias."""


class Fp8(BiasAfter):
    """Weights and activations in e4m3, a scale for each row of either; in plain PyTorch."""

    name = "fp8"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def refusal(self, rows: int, columns: int) -> str | None:
        """None: any shape will do."""
        return None

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """e4m3 `[N, K]`, and float32 scales `[N, 1]`."""
        return by_slabs(quantized.quantize_fp8, weight, self.device, (0, 0))

    def product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """`Scheme.linear` without the bias."""
        return quantized.linear_fp8(x, *packed)


class ScaledMMFp8(Fp8):
    """The same by `torch._scaled_mm`, for CPUs (it widens the weight in each call)."""

    def product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """`Scheme.linear` without the bias."""
        weight, scale = packed
        rows, row_scale = quantized.quantize_fp8(x)
        # Its own scales are one for all rows in PyTorch 2.11, which has no others on a CPU.
        one = torch.ones((), device=x.device)
        out: Tensor = torch._scaled_mm(rows, weight.t(), one, one, out_dtype=torch.float32)
        return (out * row_scale * scale.t()).to(x.dtype)


class CudaFp8(Fp8):
    """`torch._scaled_mm` on a card: it takes multiples of 16 and scales by row."""

    def refusal(self, rows: int, columns: int) -> str | None:
        """A reason for sizes that aren't multiples of 16."""
        return _not_multiple(rows, columns, 16, 16)

    def product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """`Scheme.linear` without the bias."""
        weight, scale = packed
        rows, row_scale = quantized.quantize_fp8(x)
        # bfloat16 is what it writes where it scales by row.
        out: Tensor = torch._scaled_mm(
            rows, weight.t(), row_scale, scale.t(), out_dtype=torch.bfloat16
        )
        return out.to(x.dtype)


class Int8(BiasAfter):
    """Weights from -127 to 127, a scale for each row; activations stay. In plain PyTorch."""

    name = "int8"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def refusal(self, rows: int, columns: int) -> str | None:
        """None: any shape will do."""
        return None

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """int8 `[N, K]`, and scales `[N]`."""
        return by_slabs(quantized.quantize_int8, weight, self.device, (0, 0))

    def product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """`Scheme.linear` without the bias."""
        weight = quantized.dequantize_int8(*packed)
        return torch.nn.functional.linear(x, weight.to(x.dtype))


class PackedInt8(Int8):
    """PyTorch's `_weight_int8pack_mm` for few rows; for many, the weight is widened."""

    def refusal(self, rows: int, columns: int) -> str | None:
        """A reason for widths that the CPU's vectors would read beyond (PyTorch doesn't check)."""
        return _not_multiple(rows, columns, 1, 16)

    def product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """`Scheme.linear` without the bias."""
        weight, scale = packed
        if not 0 < len(x) <= MAX_INT8_ROWS or not self.has_kernel(x.dtype):
            return super().product(x, packed)
        if x.data_ptr() % 32:  # the CPU's kernel loads whole vectors, and takes them for aligned
            x = x.clone()
        out: Tensor = torch.ops.aten._weight_int8pack_mm(x, weight, scale.to(x.dtype))
        return out

    def has_kernel(self, dtype: torch.dtype) -> bool:
        """On CPUs PyTorch has vector code for bfloat16; on a card it has a plain loop, which is
        slower than widening the weight."""
        return self.device.type == "cpu" and dtype == torch.bfloat16


class Int4(BiasAfter):
    """Weights from 0 to 15, a scale and a zero point for each group of columns; plain PyTorch."""

    name = "int4"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def refusal(self, rows: int, columns: int) -> str | None:
        """A reason for widths that aren't a multiple of the smallest group."""
        return _not_multiple(rows, columns, 1, GROUPS[-1])

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Bytes `[N, K / 2]`, and scales and zero points `[K / group, N, 2]`."""
        return self.in_groups(weight, quantized.pack_nibbles)

    def in_groups(
        self, weight: Tensor, layout: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, ...]:
        """`quantize_int4`'s numbers, laid out, and scales; with the largest group that fits."""
        group = group_of(weight.shape[1])

        def quantize(slab: Tensor) -> tuple[Tensor, Tensor]:
            numbers, scales = quantized.quantize_int4(slab, group)
            return numbers if layout is None else layout(numbers), scales

        return by_slabs(quantize, weight, self.device, (0, 1))

    def product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """`Scheme.linear` without the bias."""
        numbers = quantized.unpack_nibbles(packed[0]).int()
        weight = quantized.dequantize_int4(numbers, packed[1])
        return torch.nn.functional.linear(x, weight.to(x.dtype))


class CpuInt4(Int4):
    """`_weight_int4pack_mm_for_cpu`, for bfloat16: for others it has no vector code."""

    def refusal(self, rows: int, columns: int) -> str | None:
        """A reason for sizes that the kernel doesn't take."""
        return _not_multiple(rows, columns, 16, GROUPS[-1])

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The kernel's own layout for bfloat16, else the plain one."""
        if weight.dtype != torch.bfloat16:
            return super().quantize(weight)
        numbers, scales = self.in_groups(weight)
        return torch.ops.aten._convert_weight_to_int4pack_for_cpu(numbers, 1), scales

    def product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """`Scheme.linear` without the bias."""
        weight, scales = packed
        if scales.dtype != torch.bfloat16:
            return super().product(x, packed)
        group = x.shape[1] // len(scales)
        out: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(
            x.to(torch.bfloat16), weight, group, scales
        )
        return out.to(x.dtype)


class CudaInt4(Int4):
    """`_weight_int4pack_mm` (tinygemm), which computes in bfloat16."""

    def refusal(self, rows: int, columns: int) -> str | None:
        """A reason for sizes that the kernel doesn't take."""
        return _not_multiple(rows, columns, 8, GROUPS[-1])

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The kernel's own layout, and scales and zero points in bfloat16."""
        nibbles, scales = self.in_groups(weight.to(torch.bfloat16), quantized.pack_nibbles)
        # Tiles of 16 columns that lie together; the more, the longer the kernel's loads.
        tiles = next(tiles for tiles in (8, 4, 2) if weight.shape[1] % (16 * tiles) == 0)
        return torch.ops.aten._convert_weight_to_int4pack(nibbles, tiles), scales

    def product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
        """`Scheme.linear` without the bias."""
        weight, scales = packed
        group = x.shape[1] // len(scales)
        out: Tensor = torch.ops.aten._weight_int4pack_mm(
            x.to(torch.bfloat16), weight, group, scales
        )
        return out.to(x.dtype)


class OwnKernels:
    """Kernels of ours: groups of 32 columns share a scale, activations are made 8 bits.

    Heads get 8 bits in any case. Left at 16 they would be a fifth of what a step of a 0.5B model
    reads; with 4 their error would be in every logit, with nothing behind it to even it out.
    """

    def __init__(self, name: str, bits: int, device: torch.device) -> None:
        self.name = name
        self.bits = bits
        self.device = device

    @property
    def head(self) -> Scheme:
        """The same kernels for 8 bits."""
        return self if self.bits == 8 else OwnKernels("int8", 8, self.device)

    def refusal(self, rows: int, columns: int) -> str | None:
        """None: any shape will do."""
        return None

    def quantize(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Bytes and scales in the kernels' layout, and an empty tensor of N rows, which tells N."""
        made = ops.quantize_linear(weight, self.bits)
        assert made is not None  # `make_scheme` has tried its dtype
        return *made, weight.new_empty(len(weight), 0)

    def linear(self, x: Tensor, packed: tuple[Tensor, ...], bias: Tensor | None) -> Tensor:
        """See `Scheme.linear`."""
        data, scales, rows = packed
        return ops.linear_quantized(x, data, scales, len(rows), self.bits, bias)


#: Bits of the schemes that our own kernels may have.
BITS = {"int8": 8, "int4": 4}

#: By scheme and type of device: the class, and the least compute capability of a card.
SCHEMES: dict[tuple[str, str], tuple[Callable[[torch.device], Scheme], tuple[int, int]]] = {
    ("fp8", "cpu"): (ScaledMMFp8, (0, 0)),
    ("fp8", "cuda"): (CudaFp8, (8, 9)),
    ("int8", "cpu"): (PackedInt8, (0, 0)),
    ("int8", "cuda"): (PackedInt8, (0, 0)),
    ("int4", "cpu"): (CpuInt4, (0, 0)),
    ("int4", "cuda"): (CudaInt4, (8, 0)),
}


def make_scheme(name: str | None, device: torch.device, dtype: torch.dtype) -> Scheme | None:
    """The scheme of this name for `device`, tried once on weights of `dtype`; None: none.

    Raises:
        StartupError: the device can't compute it.
    """
    if name is None:
        return None
    make, capability = SCHEMES[name, device.type]
    if device.type == "cuda" and (own := torch.cuda.get_device_capability(device)) < capability:
        others = "int4 or int8" if own >= (8, 0) and name != "int4" else "int8"
        raise StartupError(
            f"this card can't compute {name}: {torch.cuda.get_device_name(device)} has compute "
            f"capability {own[0]}.{own[1]}, and {name} needs {capability[0]}.{capability[1]}. "
            f"Use --quantization {others}, or none."
        )
    weight = torch.linspace(-1, 1, 64 * 128, device=device).view(64, 128).to(dtype)
    if name in BITS and ops.quantize_linear(weight, BITS[name]) is not None:
        return OwnKernels(name, BITS[name], device)
    scheme = make(device)
    try:
        scheme.linear(weight[:2], scheme.quantize(weight), None).sum().item()
    except RuntimeError as error:  # or one of its kinds: PyTorch has no kernel for it
        cause = str(error).split("\n", 1)[0]
        raise StartupError(
            f"PyTorch can't compute {name} on {device}: {torch.__version__} says: {cause} "
            "Use another --quantization, or none, or another build of PyTorch."
        ) from error
    return scheme


def group_of(columns: int) -> int:
    """How many columns share a scale of int4: the largest group that divides the width."""
    return next(group for group in GROUPS if columns % group == 0)


def by_slabs(
    quantize: Callable[[Tensor], tuple[Tensor, ...]],
    weight: Tensor,
    device: torch.device,
    dims: tuple[int, ...],
) -> tuple[Tensor, ...]:
    """What `quantize` makes of `weight` on `device`, put together from slabs of whole rows.

    It computes in float32 and more: of a whole layer, that would be many times what is left in the
    end. `dims` are the dimensions that rows are in, for each tensor that it makes.
    """
    num_rows = max(1, MAX_SLAB // weight.shape[1])
    slabs = [quantize(slab.to(device)) for slab in weight.split(num_rows)]
    return tuple(
        torch.cat(parts, dim) for parts, dim in zip(zip(*slabs, strict=True), dims, strict=True)
    )


def _not_multiple(rows: int, columns: int, of_rows: int, of_columns: int) -> str | None:
    """A reason if sizes aren't multiples of these."""
    for size, what, unit in ((columns, "inputs", of_columns), (rows, "outputs", of_rows)):
        if size % unit:
            return f"{size} {what} aren't a multiple of {unit}"
    return None
