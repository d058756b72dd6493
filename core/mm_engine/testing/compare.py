"""Whether tensors are equal up to float32's rounding, and if not, by how much and where."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

#: Of the largest number: sums in another order differ by less, anything wrong by more.
TOLERANCE = 2e-4
#: Logits are a long way from the input; a tie within this may fall either way.
LOGITS_TOLERANCE = 1e-3


def difference(expected: Tensor, got: Tensor, tolerance: float = TOLERANCE) -> str | None:
    """Say how `got` differs, or None if it doesn't but for rounding.

    Shapes with the same rows in the same order are equal: `[1, 9, 64]` and `[9, 64]`.
    """
    if expected.shape[-1:] != got.shape[-1:] or expected.numel() != got.numel():
        return f"shape {list(got.shape)} instead of {list(expected.shape)}"
    expected = expected.detach().double().reshape(-1, expected.shape[-1])
    got = got.detach().double().reshape(expected.shape)
    if not bool(torch.isfinite(got).all()):
        return "NaN or infinity"
    gap = (got - expected).abs()
    most, scale = float(gap.max()), float(expected.abs().max())
    if most <= tolerance * max(scale, 1e-6):
        return None
    wrong = (gap.amax(-1) > tolerance * scale).nonzero().flatten()
    row, column = divmod(int(gap.argmax()), gap.shape[1])
    rows = f"{len(wrong)} of {len(gap)} rows differ, the first is row {int(wrong[0])}"
    where = f"{rows}; most at row {row}, column {column}" if len(gap) > 1 else f"most at {column}"
    return f"off by up to {most:.3g} where numbers go up to {scale:.3g} ({where})"


def first_untied(
    expected: Sequence[int], got: Sequence[int], logits: Sequence[Tensor]
) -> tuple[int, float] | None:
    """Where two greedy answers part for more than rounding, and the gap; None if nowhere.

    `logits[n]` are those that token n of `got` was taken from. After a tie the answers may differ.
    """
    for position, (want, have) in enumerate(zip(expected, got, strict=False)):
        if want != have:
            scale = float(logits[position].abs().max())
            gap = float(logits[position][have] - logits[position][want])
            return None if gap <= LOGITS_TOLERANCE * max(scale, 1e-6) else (position, gap)
    return None if len(expected) == len(got) else (min(len(expected), len(got)), 0.0)
