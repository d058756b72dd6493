"""The optimizers of every stage: Muon for the hidden matrices, AdamW for the rest."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

WARMUP_STEPS = 60


class Optimizers:
    """Muon and AdamW under one learning rate: linear warm-up, then a cosine to zero.

    Muon's update is scaled to AdamW's root mean square (``match_rms_adamw``), so both take
    the same rate. Embeddings, biases, norms and ``adamw_only`` modules go to AdamW.
    """

    def __init__(
        self,
        modules: Iterable[nn.Module],
        adamw_only: Iterable[nn.Module],
        *,
        rate: float,
        num_steps: int,
    ) -> None:
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = [p for module in adamw_only for p in module.parameters()]
        for module in modules:
            for part in module.modules():
                for name, parameter in part.named_parameters(recurse=False):
                    hidden = isinstance(part, nn.Linear) and name == "weight"
                    (matrices if hidden else others).append(parameter)
        self.parameters = [*matrices, *others]
        self.rate, self.num_steps, self.step_index = rate, num_steps, 0
        self._all: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.01),
        )

    def step(self) -> None:
        """Apply the gradients, clipped, and clear them."""
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for optimizer in self._all:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * self._factor()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step_index += 1

    def _factor(self) -> float:
        if self.step_index < WARMUP_STEPS:
            return (self.step_index + 1) / WARMUP_STEPS
        progress = (self.step_index - WARMUP_STEPS) / max(1, self.num_steps - WARMUP_STEPS)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
