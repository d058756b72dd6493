"""CUDA graphs without a card: what is "captured" is called again at each replay.

So the padded run over tensors that stay where they are is the one that a card gets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from mm_engine.worker import graphs
from mm_engine.worker.batch import StepLayout
from mm_engine.worker.graphs import CudaRecorder, DecodeGraphs


class CallAgain:
    """In place of `CudaRecorder`; runs twice, as that does."""

    what: ClassVar = CudaRecorder.what
    sizes: ClassVar = CudaRecorder.sizes
    missed: ClassVar = CudaRecorder.missed
    on_demand: ClassVar = CudaRecorder.on_demand

    @classmethod
    def unfit(cls, num_ranks: int) -> str | None:
        """Any will do."""
        return None

    def __init__(self, device: torch.device) -> None:
        """Any device will do."""

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`."""
        function()
        function()
        return function


@dataclass
class Replays:
    """Which graphs ran: pairs (size, sequences)."""

    steps: list[tuple[int, int]] = field(default_factory=list)


@contextmanager
def replaying() -> Iterator[Replays]:
    """While this lasts, engines on a CPU "capture" too; on a card they do anyway."""
    replays, run = Replays(), DecodeGraphs.run

    def watched(
        self: DecodeGraphs, size: int, ids: Tensor, embeds: Tensor, layout: StepLayout
    ) -> Tensor:
        replays.steps.append((size, len(layout.positions)))
        return run(self, size, ids, embeds, layout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(graphs.RECORDERS, "cpu", CallAgain)
        patch.setattr(DecodeGraphs, "run", watched)
        yield replays
