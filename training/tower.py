"""The tower's stage: each patch learns what the painter knows about the object it shows.

A patch of an object learns the object's shape, colour and size, its place in the order from left
to right and from top to bottom, and how many objects there are in all and of its colour. The
decoder then only has to look these up. The labels' linear heads are thrown away afterwards.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from tqdm import trange
from transformers import CLIPVisionModel

from batches import SIDE, training_batch
from optim import Optimizers
from pictures import COLOURS, MAX_OBJECTS, MIN_SEPARATION, SHAPES, SIZES, Scene

PATCH = 8
GRID = SIDE // PATCH
IGNORED = -100
LABELS = {
    "object": 2,
    "shape": len(SHAPES),
    "colour": len(COLOURS),
    "size": len(SIZES),
    "rank_x": MAX_OBJECTS,
    "rank_y": MAX_OBJECTS,
    "count": MAX_OBJECTS,
    "count_colour": MAX_OBJECTS,
}
"""Number of classes by label."""
_CENTRES = (np.arange(GRID) + 0.5) / GRID


def patch_labels(scenes: tuple[Scene, ...]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return the labels, each ``[batch, patches]``, and offsets ``[batch, patches, 2]``.

    The offset points to the object's centre, in radii. Patches at an object's edge are ignored,
    and so are the labels but ``object`` on the background and ``rank_y`` where it is unclear.
    """
    shape = (len(scenes), GRID, GRID)
    labels = {name: np.full(shape, IGNORED, dtype=np.int64) for name in LABELS}
    labels["object"][:] = 0
    offsets = np.zeros((*shape, 2), dtype=np.float32)
    for i, scene in enumerate(scenes):
        heights = sorted(item.y for item in scene.objects)
        clear = min(np.diff(heights), default=1.0) >= 0.5 * MIN_SEPARATION
        for rank, item in enumerate(scene.objects):
            x, y = _CENTRES[None, :] - item.x, _CENTRES[:, None] - item.y
            distance = np.hypot(x, y)
            inside = distance < 0.8 * item.radius + 0.02
            labels["object"][i][distance < item.radius + 0.06] = IGNORED
            labels["object"][i][inside] = 1
            values = {
                "shape": SHAPES.index(item.shape),
                "colour": list(COLOURS).index(item.colour),
                "size": SIZES.index(item.size),
                "rank_x": rank,
                "rank_y": heights.index(item.y) if clear else IGNORED,
                "count": len(scene.objects) - 1,
                "count_colour": sum(o.colour == item.colour for o in scene.objects) - 1,
            }
            for name, value in values.items():
                labels[name][i][inside] = value
            offsets[i][inside] = -np.stack(np.broadcast_arrays(x, y), -1)[inside] / item.radius
    flat = {name: torch.from_numpy(label).flatten(1) for name, label in labels.items()}
    return flat, torch.from_numpy(offsets).flatten(1, 2)


class PatchHeads(nn.Module):
    """Linear readers of every label from a patch's features ``[batch, patches, hidden]``."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.widths = [*LABELS.values(), 2]
        self.linear = nn.Linear(hidden_size, sum(self.widths))

    def forward(
        self, features: torch.Tensor, labels: dict[str, torch.Tensor], offsets: torch.Tensor
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return the loss and, by label, the share of labelled patches read rightly.

        Labels that no patch has count for nothing, and their share is NaN.
        """
        *logits, offset = self.linear(features).float().split(self.widths, dim=-1)
        inside = labels["object"] == 1
        loss = 0.2 * functional.mse_loss(offset[inside], offsets[inside])
        right: dict[str, torch.Tensor] = {}
        for (name, label), scores in zip(labels.items(), logits, strict=True):
            labelled = label != IGNORED
            if labelled.any():
                loss = loss + functional.cross_entropy(scores.flatten(0, 1), label.flatten())
            right[name] = (scores.argmax(-1) == label)[labelled].float().mean().detach()
        return loss, right


def initialise_tower(tower: CLIPVisionModel) -> None:
    """Give a fresh tower sinusoidal positions, and attention that starts out local.

    The attention follows "Mimetic Initialization of Self-Attention Layers" (Trockman and Kolter,
    2023): query-key products near the identity, value-output products near minus the identity.
    """
    width = tower.config.hidden_size
    frequencies = np.pi * 2.0 ** np.linspace(-1, 2.5, width // 4)
    angles = _CENTRES[:, None] * frequencies
    waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    grid = np.concatenate(
        [np.tile(waves[:, None], (1, GRID, 1)), np.tile(waves[None], (GRID, 1, 1))], axis=-1
    ).reshape(GRID * GRID, width)
    with torch.no_grad():
        embeddings = tower.embeddings
        embeddings.position_embedding.weight[1:] = torch.from_numpy(grid).float()
        embeddings.position_embedding.weight[0] = 0
        nn.init.normal_(embeddings.patch_embedding.weight, std=0.5 / PATCH)
        for layer in tower.encoder.layers:
            attention = layer.self_attn
            heads, size = attention.num_heads, attention.head_dim
            for head in range(heads):
                rows = slice(head * size, (head + 1) * size)
                query, key = _factors(width, size, noise=0.7, identity=0.7)
                attention.q_proj.weight[rows] = query * size**0.25
                attention.k_proj.weight[rows] = key * size**0.25
            value, output = _factors(width, width, noise=0.4, identity=-0.4)
            attention.v_proj.weight[:] = value
            attention.out_proj.weight[:] = output.T


def _factors(
    width: int, size: int, *, noise: float, identity: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``a`` and ``b``, both ``[size, width]``, with ``aᵀb`` near noise + identity."""
    product = noise * torch.randn(width, width) / width**0.5 + identity * torch.eye(width)
    left, scale, right = torch.linalg.svd(product)
    root = scale[:size].sqrt()[:, None]
    return root * left[:, :size].T, root * right[:size]


def train_tower(
    tower: CLIPVisionModel,
    heads: PatchHeads,
    *,
    num_steps: int,
    batch_size: int,
    rate: float,
    first_seed: int,
    on_report: Callable[[int], None],
) -> None:
    """Train tower and heads in place; ``on_report`` is called with the step at each report."""
    optimizers = Optimizers([tower], [heads], rate=rate, num_steps=num_steps)
    bar = trange(num_steps, desc="tower", mininterval=5)
    for step in bar:
        batch = training_batch(first_seed + step * batch_size, batch_size)
        with torch.autocast("cpu", torch.bfloat16):
            features = tower(batch.pixel_values).last_hidden_state[:, 1:]
            loss, right = heads(features, *patch_labels(batch.scenes))
        loss.backward()
        optimizers.step()
        if step % 50 == 49:
            shares = " ".join(f"{name} {value:.2f}" for name, value in right.items())
            bar.write(f"tower step {step + 1}: loss {loss.item():.3f} {shares}")
            on_report(step + 1)
