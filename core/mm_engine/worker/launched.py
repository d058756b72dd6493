"""A step that was launched: what is still on the device, and its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from mm_engine_kernels import ops
from torch import Tensor

from mm_engine.outputs import ErrorInfo
from mm_engine.sequence import SampledToken, StepResult
from mm_engine.worker.batch import ForwardBatch
from mm_engine.worker.transfers import HostCopy, SampledId


class SampledShares(Protocol):
    """What is being sampled for some shares of a step."""

    @property
    def ids(self) -> Tensor:
        """`[N]` the newest id of each, on the device."""
        ...

    @property
    def host_ids(self) -> HostCopy:
        """The same, on their way to the host."""
        ...

    def tokens(self) -> list[SampledToken]:
        """One for each share, once the device has them."""
        ...


@dataclass(frozen=True, slots=True)
class Finite:
    """Which rows of a step are finite, as far as the device has come."""

    hidden: HostCopy  # [T] bool
    logits: HostCopy | None  # [R] bool
    query_lens: list[int]
    sampled: list[int]  # [R]: the share of each row of logits

    @classmethod
    def of(cls, hidden: Tensor, logits: Tensor | None, forward: ForwardBatch) -> Finite:
        """Ask it of `hidden` `[T, hidden]` and `logits` `[R, vocab]`, without waiting.

        A chunk that samples nothing is looked at too: its sequence may end before one that does,
        and whoever gets its blocks then would read NaN from them.
        """
        return cls(
            HostCopy(hidden.isfinite().all(-1)),
            # NaN spreads to the largest; single -inf are fine.
            None if logits is None else HostCopy(ops.amax(logits).isfinite()),
            forward.layout.query_lens,
            forward.sampled,
        )

    def broken(self) -> dict[int, str]:
        """Shares that hold NaN or infinity, and the method of the model that made it. Waits."""
        broken: dict[int, str] = {}
        rows = self.hidden.tolist()
        if not all(rows):
            start = 0
            for i, num in enumerate(self.query_lens):
                if not all(rows[start : start + num]):
                    broken[i] = "forward"
                start += num
        if self.logits is not None:
            for i, finite in zip(self.sampled, self.logits.tolist(), strict=True):
                if not finite:
                    broken.setdefault(i, "compute_logits")
        return broken


class LaunchedStep:
    """A step that the device may still be computing. Steps come to their results in order."""

    def __init__(
        self,
        known: StepResult,
        blame_nan: Callable[[str, list[int]], ErrorInfo],
        check: Callable[[], None],
    ) -> None:
        """`known` already holds the errors of sequences that don't run."""
        self._known = known
        self._blame_nan = blame_nan
        self._check = check
        self._running: list[int] = []  # their places in the plan
        self._forward: ForwardBatch | None = None
        self._finite: Finite | None = None
        self._indices: list[int] = []  # in `_running`: those that sample
        self._sampled: SampledShares | None = None

    def computed(self, running: list[int], forward: ForwardBatch, finite: Finite) -> None:
        """Note what was computed for the sequences at `running` in the plan."""
        self._running, self._forward, self._finite = running, forward, finite

    def sampled(self, indices: list[int], sampled: SampledShares) -> None:
        """Note what is sampled for those at `indices` of the running ones."""
        assert self._forward is not None
        self._indices, self._sampled = indices, sampled
        for position, i in enumerate(indices):
            sequence = self._forward.scheduled[i].sequence
            id_ = sampled.ids[position : position + 1]
            sequence.newest = SampledId(id_, sampled.host_ids, position)

    @property
    def failed(self) -> bool:
        """Whether a sequence has failed already, before the result is there."""
        return len(self._running) < len(self._known.tokens)

    def result(self) -> StepResult:
        """Wait for the step; its sequences' tokens and errors.

        Raises:
            EngineDead: a rank is gone, and what the others summed up without it is no result.
        """
        tokens = list(self._known.tokens)
        if self._forward is not None and self._finite is not None:
            if self._sampled is not None:
                sampled = self._sampled.tokens()
                for i, token in zip(self._indices, sampled, strict=True):
                    tokens[self._running[i]] = token
            broken = self._finite.broken()
            self._check()  # behind the waits: what ends a rank lets go of them
            for i, method in broken.items():
                error = self._blame_nan(method, self._forward.slots(i))
                tokens[self._running[i]] = SampledToken(error=error)
        return StepResult(tokens, self._known.slice_is_last)
