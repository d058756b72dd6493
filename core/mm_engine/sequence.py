"""A request's life in the engine (`Sequence`) and one step's plan and result."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from mm_engine.outputs import ErrorInfo
from mm_engine.request import Item, Request

#: In `Sequence.token_ids`: a step was launched that samples this token, and has yet to tell it.
UNKNOWN_TOKEN = -1


class SequenceStatus(enum.Enum):
    """Where a sequence is; a preempted one is waiting again."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """One completion of a request: the engine's only mutable state for it.

    Compared by identity. A request with n completions has n sequences.
    """

    request: Request
    index: int = 0  # which of the request's n completions
    token_ids: list[int] = field(init=False)  # prompt, then output
    num_computed_tokens: int = 0  # of token_ids: those in the cache, or in a launched step
    num_cached_tokens: int | None = None  # found in the cache when it was admitted first
    block_table: list[int] = field(default_factory=list)  # owner: engine/kv_cache.py
    block_keys: list[bytes] = field(default_factory=list)  # owner: engine/block_keys.py
    ngrams: Any = None  # owner: engine/prompt_lookup.py
    status: SequenceStatus = SequenceStatus.WAITING  # owner: engine/scheduler.py
    arrival: int = 0  # how many came before it; owner: engine/scheduler.py
    finish_reason: str | None = None  # owner: engine/engine.py
    num_preemptions: int = 0
    arrival_time: float = 0.0  # seconds by time.monotonic(); owner: engine/scheduler.py
    start_time: float | None = None  # of its first step, by the same clock and owner
    detokenizer: Any = None  # owner: engine/detokenizer.py
    sampler_state: Any = None  # owner: worker/sampler.py
    newest: Any = None  # a SampledId, the last one; owner: worker/launched.py

    def __post_init__(self) -> None:
        self.token_ids = list(self.request.prompt_token_ids)

    @property
    def rank(self) -> tuple[int, int]:
        """Whose turn is first: the lower priority number, then the earlier arrival."""
        return self.request.priority, self.arrival

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, placeholders expanded."""
        return len(self.request.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens of prompt and output so far."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far."""
        return len(self.token_ids) - len(self.request.prompt_token_ids)

    @property
    def output_token_ids(self) -> list[int]:
        """The ids generated so far."""
        return self.token_ids[len(self.request.prompt_token_ids) :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens that the model has yet to see; 1 in decode."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def finished(self) -> bool:
        """Whether it has ended, by whatever cause."""
        return self.status is SequenceStatus.FINISHED


class _Share(NamedTuple):  # a step makes hundreds, and tuples are made fastest
    sequence: Sequence
    num_new_tokens: int
    draft_token_ids: tuple[int, ...]  # only where `samples`
    start: int
    samples: bool


class ScheduledSequence(_Share):
    """One sequence's share of a step: its next `num_new_tokens` uncomputed tokens.

    A decode may have a draft behind them: guesses of the tokens to come, which the step computes
    as if they were known. Those that the model would have sampled are taken.

    `start` is the position of its first token. `samples` says that it reaches the sequence's last
    token, so that a next one is sampled; with a draft up to `len(draft_token_ids)` more are. Both
    are as they were when the share was planned: the sequence may have gone on since.
    """

    __slots__ = ()

    def __new__(
        cls, sequence: Sequence, num_new_tokens: int, draft_token_ids: tuple[int, ...] = ()
    ) -> ScheduledSequence:
        """Plan the next tokens of a sequence."""
        start = sequence.num_computed_tokens
        samples = start + num_new_tokens == len(sequence.token_ids)
        return tuple.__new__(cls, (sequence, num_new_tokens, draft_token_ids, start, samples))

    @property
    def end(self) -> int:
        """Position after the last known token of this share; a draft begins there."""
        return self.start + self.num_new_tokens

    @property
    def num_rows(self) -> int:
        """Tokens that the model computes for this share: the known ones and the draft."""
        return self.num_new_tokens + len(self.draft_token_ids)


@dataclass(frozen=True, slots=True)
class EncodeSlice:
    """A piece of one item's encoding: as much as `seconds` allow. The next goes on from there."""

    item: Item
    seconds: float


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """The plan of one step: who runs, how many tokens each, and which items are encoded first."""

    sequences: tuple[ScheduledSequence, ...]
    encode: tuple[Item, ...] = ()  # each content key once; their features go to the encoder cache
    evict: tuple[str, ...] = ()  # content keys whose features the worker drops before encoding
    encode_slice: EncodeSlice | None = None  # no sequence of this step needs that item's features

    def __bool__(self) -> bool:
        """Whether there is anything to do."""
        return bool(self.sequences or self.encode or self.evict or self.encode_slice)

    @property
    def num_tokens(self) -> int:
        """Tokens in this step over all sequences, drafts included."""
        return sum(scheduled.num_rows for scheduled in self.sequences)


@dataclass(slots=True)
class SampledToken:
    """What a step brought one scheduled sequence: a token, nothing (mid-prefill), or an error.

    Where its draft began as the answer goes on, more than one token.
    """

    token_id: int | None = None
    logprob: float | None = None  # of token_id, under the model's own distribution
    rank: int | None = None  # of token_id; 1 is the likeliest
    top_logprobs: list[tuple[int, float]] | None = (
        None  # (token id, log-probability), likeliest first
    )
    error: ErrorInfo | None = None  # the request fails with this, its neighbours go on
    accepted: tuple[SampledToken, ...] = ()  # the tokens before this one: the draft's first ones


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step brought."""

    tokens: list[SampledToken]  # aligned with the plan's `sequences`
    slice_is_last: bool = False  # `encode_slice` brought its item to the end, or to its failure
