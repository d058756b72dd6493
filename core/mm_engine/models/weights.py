"""Copying a checkpoint's tensors into a model's parameters, by name."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from mm_engine.config import Piece
from mm_engine.errors import StartupError
from mm_engine.models.layers import Linear, length_of
from mm_engine.models.packed_weights import PackedWeight
from mm_engine.models.tensor_file import copy_into

#: Numbers that are drawn for a tensor of random weights at most. A prime: no two rows of a matrix
#: begin at the same of them, so that its rows differ.
DRAWN = 1_048_583


@dataclass(slots=True)
class WeightReport:
    """What became of a checkpoint's tensors."""

    loaded: set[str] = field(default_factory=set)  # names in the model
    unused: list[str] = field(default_factory=list)  # names in the checkpoint
    missing: list[str] = field(default_factory=list)  # names in the model


@dataclass(frozen=True, slots=True)
class Target:
    """Where a checkpoint's tensor goes: a view into the model's parameters, and its piece of it."""

    tensor: Tensor
    rows: Piece | None = None  # None: all of the checkpoint's
    columns: Piece | None = None

    @property
    def shape(self) -> list[int]:
        """The shape that the checkpoint's tensor must have."""
        shape = list(self.tensor.shape)
        for dim, piece in ((0, self.rows), (1, self.columns)):
            if piece is not None and dim < len(shape):
                shape[dim] = piece.whole
        return shape

    def pieces(self, whole: Tensor) -> tuple[Tensor, Tensor]:
        """This process's piece of the checkpoint's tensor, and the place for it."""
        place = self.tensor
        for dim, piece in ((0, self.rows), (1, self.columns)):
            if piece is not None and dim < place.dim():
                start = min(piece.start, piece.whole)
                whole = whole.narrow(dim, start, piece.num_real)
                place = place.narrow(dim, 0, piece.num_real)
        return whole, place


def weight_targets(model: nn.Module) -> dict[str, Target]:
    """Every tensor that a checkpoint may name, and where it goes.

    The parts of a fused `Linear` are named as the layers that they were before fusing. What was
    packed is unpacked.
    """
    targets: dict[str, Target] = {}
    public = checkpoint_names(model)
    for module_name, module in model.named_modules():
        if isinstance(module, Linear | PackedWeight):
            module.unpack()
        if isinstance(module, Linear) and module.parts:
            parent = module_name.rpartition(".")[0]
            start = 0
            for part, rows in module.parts.items():
                piece = rows if isinstance(rows, Piece) else None
                length = length_of(rows)
                for name, parameter in module.named_parameters(recurse=False):
                    view = parameter.data.narrow(0, start, length)
                    targets[public(f"{parent}.{part}.{name}")] = Target(view, piece)
                start += length
        else:
            rows_, columns = None, None
            if isinstance(module, Linear):
                rows_, columns = module.rows, module.columns
            for name, parameter in module.named_parameters(module_name, recurse=False):
                targets[public(name)] = Target(parameter.data, rows_, columns)
    return targets


def persistent_buffers(model: nn.Module) -> dict[str, Target]:
    """Buffers that a state dict holds (a batch norm's statistics), by name.

    A checkpoint may bring them; one that it doesn't keeps what the constructor computed.
    """
    public = checkpoint_names(model)
    return {
        public(f"{module_name}.{name}".lstrip(".")): Target(buffer)
        for module_name, module in model.named_modules()
        for name, buffer in module.named_buffers(recurse=False)
        if name not in module._non_persistent_buffers_set
    }


def checkpoint_names(model: nn.Module) -> Callable[[str], str]:
    """A function from names in `model` to names in its checkpoint, by its `weight_aliases`.

    A module's `weight_aliases` maps a checkpoint's name for a part to the part's own path, both
    below that module; an empty name means that the part's tensors follow the module's name.
    """
    prefixes: dict[str, str] = {}
    for module_name, module in model.named_modules():
        for shown, path in getattr(module, "weight_aliases", {}).items():
            own = ".".join(filter(None, (module_name, path)))
            prefixes[f"{own}."] = "".join(f"{part}." for part in (module_name, shown) if part)
    longest_first = dict(sorted(prefixes.items(), key=lambda pair: -len(pair[0])))
    return lambda name: rename(name, longest_first)


def rename(name: str, prefixes: Mapping[str, str]) -> str:
    """`name` with the first matching prefix replaced."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def load_into(
    model: nn.Module, weights: Iterable[tuple[str, Tensor]], prefixes: Mapping[str, str]
) -> WeightReport:
    """Copy `weights` into `model`, converting dtype and device.

    A layer that is to be quantised is, as soon as its weight is whole.

    Raises:
        StartupError: a tensor's shape isn't the parameter's, or its numbers are quantised.
    """
    targets, tied = weight_targets(model), tied_heads(model)
    buffers = persistent_buffers(model)
    report = WeightReport()
    spare: dict[str, Tensor] = {}  # heads of backbones whose config says that they have none
    joiners = {
        f"{name}.".lstrip("."): module.joined_weights()
        for name, module in model.named_modules()
        if hasattr(module, "joined_weights")
    }
    quantized = {
        name: module
        for module in model.modules()
        if isinstance(module, Linear) and module.quantizer is not None
        for name in module.quantizer.tensor_names
    }

    def take(name: str, original: str, tensor: Tensor, target: Target) -> None:
        layer = quantized.get(name)
        was_kept = layer is not None and bool(layer.quantized) and layer.weight.numel() > 0
        if not was_kept:  # by an earlier start: nothing needs to be read
            _copy(original, tensor, target)
        report.loaded.add(name)
        if layer is None or layer.quantizer is None:
            return
        if report.loaded >= layer.quantizer.tensor_names.keys():
            for part in layer.quantizer.tensor_names:
                del targets[part]  # a view, which would keep the plain weight
            layer.pack()

    for original, tensor in weights:
        name = rename(original, prefixes)
        target = targets.get(name, buffers.get(name))
        if target is None and name in tied:
            spare[name] = tensor
        elif target is None and any(
            name.startswith(prefix) and joiner.hold(name.removeprefix(prefix), tensor)
            for prefix, joiner in joiners.items()
        ):
            continue
        elif target is None:
            report.unused.append(original)
        else:
            take(name, original, tensor, target)
    for prefix, joiner in joiners.items():
        for part, tensor in joiner.joined():
            name = prefix + part
            target = targets.get(name, buffers.get(name))
            if target is None:
                report.unused.append(name)
            else:
                take(name, name, tensor, target)
    for name, tensor in spare.items():
        backbone, embeddings = tied[name]
        # As in transformers: of tied weights a checkpoint may bring either one, and if it brings
        # both and they differ, then they aren't tied.
        if embeddings not in report.loaded:
            _copy(name, tensor, targets[embeddings])
            report.loaded.add(embeddings)
        elif not torch.equal(tensor.to(targets[embeddings].tensor), targets[embeddings].tensor):
            head = backbone.untie()
            _copy(name, tensor, Target(head.weight.data, head.rows))
            report.loaded.add(name)
    report.missing = sorted(targets.keys() - report.loaded)
    return report


def tied_heads(model: nn.Module) -> dict[str, tuple[Any, str]]:
    """Names of the heads that backbones don't have: the backbone, and its embeddings' name."""
    return {
        f"{name}.lm_head.weight".lstrip("."): (
            module,
            f"{name}.{getattr(module, 'embeddings_name', 'embed_tokens')}.weight".lstrip("."),
        )
        for name, module in model.named_modules()
        if hasattr(module, "untie") and module.lm_head is None
    }


def does_not_fit(error: BaseException) -> bool:
    """Whether PyTorch or Python found no memory; on a CPU PyTorch has no class of error for it."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error) if isinstance(error, RuntimeError) else ""
    return any(
        sign in text for sign in ("alloc_cpu", "DefaultCPUAllocator", "Storage size calculation")
    )


def device_is_lost(error: BaseException) -> bool:
    """Whether the device has failed for good: after such an error every later call raises too."""
    return isinstance(error, torch.AcceleratorError) and not does_not_fit(error)


def _copy(name: str, tensor: Tensor, target: Target) -> None:
    floating = tensor.is_floating_point() and tensor.element_size() >= 2
    if not floating and tensor.dtype != target.tensor.dtype:  # a counter in a buffer is an integer
        raise StartupError(
            f"dtype of {name} in the checkpoint is not supported: {tensor.dtype}. "
            "Use a checkpoint that isn't quantised."
        )
    if target.shape != list(tensor.shape):
        raise StartupError(
            f"shape of {name} in the checkpoint: {list(tensor.shape)}, but config.json "
            f"makes it {target.shape}. The two don't belong together."
        )
    piece, place = target.pieces(tensor)
    try:
        copy_into(place, tensor, piece)
    except (SafetensorError, OSError) as error:
        raise StartupError(
            f"{name} can't be read from the checkpoint: {error}. Fetch the checkpoint again."
        ) from error


def fill_random(model: nn.Module, seed: int) -> None:
    """Random weights of a sane scale, for `--load-format dummy`; equal for equal seeds.

    Past its first `DRAWN` numbers a tensor repeats them: drawing billions would take minutes.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, target in sorted(weight_targets(model).items()):
        if target.tensor.dim() == 1 and name.endswith("weight"):
            target.tensor.fill_(1.0)  # a norm's
        elif name.endswith("bias"):
            target.tensor.zero_()
        else:
            num = min(math.prod(target.shape), DRAWN)
            drawn = torch.empty(num).normal_(0.0, 0.02, generator=generator)
            _fill(target, drawn.to(target.tensor.dtype))


def _fill(target: Target, drawn: Tensor) -> None:
    """Fill a target with `drawn` from its beginning, again and again.

    As if the whole were filled, so that processes hold equal pieces of equal tensors.
    """
    whole, (piece, place) = target.tensor, (target.tensor, target.tensor)
    in_place = target.shape == list(whole.shape) and whole.is_contiguous()
    if not in_place:
        whole = torch.empty(target.shape, dtype=drawn.dtype)
        piece, place = target.pieces(whole)
    flat = whole.view(-1)
    for start in range(0, len(flat), len(drawn)):
        part = flat[start : start + len(drawn)]
        part.copy_(drawn[: len(part)])
    if not in_place:
        place.copy_(piece)
