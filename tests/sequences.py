"""Sequences and items made by hand, for tests of one step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mm_engine.engine.fault_barrier import Computed
from mm_engine.request import Item, PlaceholderRange, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import ScheduledBatch, Sequence, StepResult


class AtOnce:
    """A runner whose steps are computed where they are launched."""

    def run(self, batch: ScheduledBatch) -> StepResult:
        """Compute one step."""
        raise NotImplementedError

    def launch(self, batch: ScheduledBatch) -> Computed:
        """A step that is over."""
        return Computed(self.run(batch))


def make_sequence(
    prompt: tuple[int, ...] = (1, 5, 6),
    output: tuple[int, ...] = (),
    *,
    items: tuple[Item, ...] = (),
    index: int = 0,
    eos: tuple[int, ...] = (),
    **params: Any,
) -> Sequence:
    """A sequence that has generated `output` so far."""
    sampling = SamplingParams(**{"max_tokens": 100, **params})
    sequence = Sequence(Request("r", prompt, sampling, items, eos), index)
    sequence.token_ids += output
    return sequence


def make_item(key: str, offset: int, length: int, number: int = 0, **tensors: Tensor) -> Item:
    """An image of `length` tokens at `offset`."""
    return Item(PlaceholderRange("image", number, offset, length), key, tensors)
