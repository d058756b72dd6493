"""One sequence's fault stays one sequence's fault."""

from __future__ import annotations

import logging
import traceback
from dataclasses import dataclass, replace
from pathlib import PurePath
from typing import Protocol

from mm_engine.errors import EngineDead, MMEngineError, RequestError
from mm_engine.models.weights import device_is_lost
from mm_engine.outputs import ErrorInfo
from mm_engine.plugins.blame import may_be_the_users, one_line
from mm_engine.request import Item
from mm_engine.sequence import SampledToken, ScheduledBatch, ScheduledSequence, StepResult

logger = logging.getLogger(__name__)


class Launched(Protocol):
    """A step that the device may still be computing."""

    @property
    def failed(self) -> bool:
        """Whether a sequence is known to have failed, before the result is there."""
        ...

    def result(self) -> StepResult:
        """Wait for the step, and for those launched before it."""
        ...


class Runner(Protocol):
    """What runs a step on the device.

    A launch that raised may be repeated: writes to the cache are idempotent, evicting what is gone
    and encoding what is there are harmless, and no sequence's sampling state has moved.
    """

    def launch(self, batch: ScheduledBatch) -> Launched:
        """Start one step, behind those launched before it.

        Those may be unfinished: where a sequence's newest token is `UNKNOWN_TOKEN`, they are about
        to sample it.

        Raises:
            EngineDead: what it computes with is gone. Anything else costs the step's sequences.
        """
        ...

    def check(self) -> None:
        """Raise `EngineDead` if what it computes with is gone."""
        ...

    def close(self) -> None:
        """Give up the device, and the processes that hold others."""
        ...


@dataclass(frozen=True, slots=True)
class Computed:
    """A launched step whose result is there."""

    known: StepResult

    @property
    def failed(self) -> bool:
        """Whether a sequence has failed."""
        return any(token.error is not None for token in self.known.tokens)

    def result(self) -> StepResult:
        """What it brought."""
        return self.known


@dataclass(frozen=True, slots=True)
class _Guarded:
    """A launched step whose result never raises.

    Each of the model's calls has returned: what raises now is the device, and others may be
    running behind this step. So it is not run again: all of its sequences fail.
    """

    launched: Launched
    num_sequences: int

    @property
    def failed(self) -> bool:
        return self.launched.failed

    def result(self) -> StepResult:
        try:
            result = self.launched.result()
        except BaseException as error:
            _raise_everybodys(error)
            told = explain(error)
            return StepResult([SampledToken(error=told) for _ in range(self.num_sequences)])
        assert len(result.tokens) == self.num_sequences
        return result


class FaultBarrier:
    """A runner that never raises: what fails is run again alone, and only that gets an error.

    But for `EngineDead`, which ends the engine: a part of the model is gone, or the device.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._owed_evictions: tuple[str, ...] = ()  # of batches in which nothing ran

    def launch(self, batch: ScheduledBatch) -> Launched:
        """Start one step; a sequence that can't be computed gets an error for its token.

        Where the launch raises, each sequence has been run alone on return.
        """
        if not batch:
            return Computed(StepResult([]))
        batch = replace(batch, evict=self._owed_evictions + batch.evict)
        self._owed_evictions = batch.evict
        try:
            return self._launch(batch)
        except BaseException as error:  # a plugin's model may raise anything, SystemExit too
            _raise_everybodys(error)
            has_draft = any(share.draft_token_ids for share in batch.sequences)
            if len(batch.sequences) <= 1 and not has_draft:
                told = explain(error)
                return Computed(StepResult([SampledToken(error=told) for _ in batch.sequences]))
            logger.warning(
                "A step of %d sequences failed: %s. Each is run alone, without a draft.",
                len(batch.sequences),
                type(error).__name__,
            )
        return self._run_each_alone(batch)

    def check(self) -> None:
        """See `Runner`."""
        self._runner.check()

    def close(self) -> None:
        """See `Runner`."""
        self._runner.close()

    def _launch(self, batch: ScheduledBatch) -> Launched:
        launched = self._runner.launch(batch)
        self._owed_evictions = ()
        return _Guarded(launched, len(batch.sequences))

    def _run_each_alone(self, batch: ScheduledBatch) -> Computed:
        sampled: list[SampledToken] = []
        for share in batch.sequences:
            share = share._replace(draft_token_ids=())  # nobody asked for it: it fails nobody
            keys = needed_keys(share)
            encode = tuple(item for item in batch.encode if item.content_key in keys)
            try:
                alone = ScheduledBatch((share,), encode, self._owed_evictions)
                sampled += self._launch(alone).result().tokens
            except BaseException as error:
                _raise_everybodys(error)
                sampled.append(SampledToken(error=explain(error)))
        return Computed(StepResult(sampled))  # an item encoded in slices gets its next one


def _raise_everybodys(error: BaseException) -> None:
    """Raise what is no sequence's fault: the user's interrupt, or a device that is gone."""
    if may_be_the_users(error) or isinstance(error, EngineDead):
        raise error
    if device_is_lost(error):
        logger.error("The device has failed: %s", one_line(error))
        name = type(error).__name__
        raise EngineDead(
            f"the engine has stopped: its device has failed ({name}). Start it again."
        ) from error


def needed_keys(scheduled: ScheduledSequence) -> set[str]:
    """Content keys of the items that this share of a step touches."""

    def touched(item: Item) -> bool:
        return item.placeholder.offset < scheduled.end and item.placeholder.end > scheduled.start

    return {item.content_key for item in scheduled.sequence.request.items if touched(item)}


def explain(error: BaseException) -> ErrorInfo:
    """What the caller is told of an exception; the log is told where it came from.

    Messages and tracebacks of unforeseen exceptions may hold prompts or paths: the caller gets
    the class only, and the log the traceback only at level debug.
    """
    if not isinstance(error, RequestError):
        logger.error("A sequence failed: %s.", place_of(error))
        logger.debug("Its traceback:", exc_info=error)
    if isinstance(error, MMEngineError):
        return ErrorInfo(type(error).__name__, str(error), getattr(error, "param", None))
    message = f"internal error: {type(error).__name__}. The engine's log says where."
    return ErrorInfo("MMEngineError", message)


def place_of(error: BaseException) -> str:
    """The class of an exception, and the file and line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return type(error).__name__
    return f"{type(error).__name__} at {PurePath(frames[-1].filename).name}:{frames[-1].lineno}"
