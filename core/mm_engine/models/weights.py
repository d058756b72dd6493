"""Copying a checkpoint's tensors into a model's parameters, by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mm_engine.errors import StartupError
from mm_engine.models.layers import Linear


@dataclass(slots=True)
class WeightReport:
    """What became of a checkpoint's tensors."""

    loaded: set[str] = field(default_factory=set)  # names in the model
    unused: list[str] = field(default_factory=list)  # names in the checkpoint
    missing: list[str] = field(default_factory=list)  # names in the model


def weight_targets(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that a checkpoint may name, as a view into the model's parameters.

    The parts of a fused `Linear` are named as the layers that they were before fusing.
    """
    targets: dict[str, Tensor] = {}
    for module_name, module in model.named_modules():
        prefix = f"{module_name}." if module_name else ""
        for old, new in getattr(module, "weight_aliases", {}).items():
            for name, parameter in getattr(module, new).named_parameters():
                targets[f"{prefix}{old}.{name}"] = parameter.data
    aliased = {tensor.data_ptr() for tensor in targets.values()}
    for module_name, module in model.named_modules():
        if isinstance(module, Linear) and module.parts:
            parent = module_name.rpartition(".")[0]
            start = 0
            for part, rows in module.parts.items():
                for name, parameter in module.named_parameters(recurse=False):
                    targets[f"{parent}.{part}.{name}"] = parameter.data.narrow(0, start, rows)
                start += rows
        else:
            for name, parameter in module.named_parameters(module_name, recurse=False):
                if parameter.data.data_ptr() not in aliased:
                    targets[name] = parameter.data
    return targets


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

    Raises:
        StartupError: a tensor's shape isn't the parameter's.
    """
    targets = weight_targets(model)
    report = WeightReport()
    for original, tensor in weights:
        name = rename(original, prefixes)
        target = targets.get(name)
        if target is None:
            report.unused.append(original)
            continue
        if target.shape != tensor.shape:
            raise StartupError(
                f"shape of {original} in the checkpoint: {list(tensor.shape)}, but config.json "
                f"makes it {list(target.shape)}. The two don't belong together."
            )
        target.copy_(tensor)
        report.loaded.add(name)
    report.missing = sorted(targets.keys() - report.loaded)
    return report


def fill_random(model: nn.Module, seed: int) -> None:
    """Random weights of a sane scale, for `--load-format dummy`; equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in sorted(weight_targets(model).items()):
        if tensor.dim() == 1 and name.endswith("weight"):
            tensor.fill_(1.0)  # a norm's
        elif name.endswith("bias"):
            tensor.zero_()
        else:
            tensor.copy_(torch.empty(tensor.shape).normal_(0.0, 0.02, generator=generator))
