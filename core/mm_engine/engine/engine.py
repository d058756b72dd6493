"""The engine's spine: schedule, launch, process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mm_engine.config import EngineConfig
from mm_engine.engine.detokenizer import Detokenizer, token_text
from mm_engine.engine.encoder_cache import EncoderCache
from mm_engine.engine.fault_barrier import FaultBarrier, Launched, Runner, explain, needed_keys
from mm_engine.engine.kv_cache import KVCache
from mm_engine.engine.pace import Pace
from mm_engine.engine.prompt_lookup import PromptLookup
from mm_engine.engine.request_check import check_request
from mm_engine.engine.scheduler import Scheduler
from mm_engine.engine.status import EngineInfo, EngineStats
from mm_engine.errors import RequestError
from mm_engine.outputs import CompletionOutput, ErrorInfo, Logprob, RequestOutput, RequestTimes
from mm_engine.request import Request
from mm_engine.sequence import (
    UNKNOWN_TOKEN,
    SampledToken,
    ScheduledBatch,
    ScheduledSequence,
    Sequence,
    StepResult,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass(slots=True)
class _Answer:
    """A request that is being answered, and what is new of the answer since that was told."""

    sequences: list[Sequence]
    news: dict[int, CompletionOutput] = field(default_factory=dict)  # by the sequence's index
    error: ErrorInfo | None = None
    times: RequestTimes | None = None  # with the news of the first token

    def tell(self, new: CompletionOutput) -> None:
        """Add what is new to what is to be told with it."""
        known = self.news.setdefault(new.index, new)
        if known is not new:
            known.extend(new)


@dataclass(slots=True)
class _InFlight:
    """A step that was launched and has yet to be processed."""

    scheduled: ScheduledBatch
    launched: Launched
    seconds: float  # that the launch took

    @property
    def holds_up_the_next(self) -> bool:
        """Whether the next step can't be planned before this one's result is known."""
        return self.launched.failed or self.scheduled.encode_slice is not None


class Engine:
    """Answers requests, step by step. `runner` computes, everything else is decided here.

    `num_blocks` blocks of `config.block_size` tokens are the KV cache. `max_model_len` (tokens)
    and `max_encoder_rows` are the config's maximum and one step's tokens where not given.
    `model` names all that keys and values depend on besides a prompt: checkpoint, plugin, dtype.
    `pace` bounds how long prompts may hold up decodes; without it nothing does. With a `clock` it
    learns how long steps take.

    With `config.async_scheduling` steps overlap: each is planned and launched while the device may
    be computing the one before it, by counts alone. In `Sequence.token_ids` an `UNKNOWN_TOKEN`
    stands for what that one samples. A sequence that ends with it has one token too many launched,
    which is dropped.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        tokenizer: PreTrainedTokenizerFast,
        *,
        num_blocks: int,
        max_model_len: int | None = None,
        max_encoder_rows: int | None = None,
        model: str = "",
        pace: Pace | None = None,
        slices_images: bool = True,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self.runner = FaultBarrier(runner)
        self.tokenizer = tokenizer
        self._clock = clock
        self._in_flight: deque[_InFlight] = deque()  # in the order of their launch
        self.max_in_flight = 1 if config.async_scheduling else 0  # between two calls of `step`
        self.info: EngineInfo | None = None  # what was loaded; `build_engine` fills it in
        self.kv_cache = KVCache(
            num_blocks, config.block_size, reuses=config.enable_prefix_caching, model=model
        )
        max_step_rows = config.max_num_batched_tokens
        self.encoder_cache = EncoderCache(max_encoder_rows or max_step_rows, max_step_rows)
        self.scheduler = Scheduler(
            self.kv_cache,
            self.encoder_cache,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            pace=pace,
            slices_images=slices_images,
            prompt_lookup=PromptLookup(
                config.num_speculative_tokens,
                longest=config.prompt_lookup_max,
                shortest=config.prompt_lookup_min,
            )
            if config.num_speculative_tokens
            else None,
        )
        self.max_model_len = max_model_len or config.max_model_len or self.kv_cache.max_tokens
        self._answers: dict[str, _Answer] = {}  # by request id, until the last news is taken
        self._changed: dict[str, _Answer] = {}  # those that have news
        self._output_interval = config.output_interval
        self._told_all = 0.0  # when all news was taken, by `time.monotonic`
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0
        self._num_steps = 0
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._num_accepted_tokens = 0

    def step(self) -> list[RequestOutput]:
        """Launch one step and report one: the same, or with overlap the one before it.

        Returns what is new for each request that has news, or as much of it as is to be told now.
        """
        if self.scheduler.waits_for_result:  # rarely: somebody has to give way
            self._process_in_flight()
        before = self._in_flight[-1].scheduled if self._in_flight else None

        scheduled = self.scheduler.schedule(before)  # who runs this step, how many tokens each
        self._launch(scheduled)  # one device step
        self._process_in_flight(but=self.max_in_flight if scheduled else 0)  # append, stop, ...
        return self._take_news()

    @property
    def has_work(self) -> bool:
        """Whether a call of `step` would do anything."""
        return self.scheduler.has_work or bool(self._answers or self._in_flight)

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            RequestError: it could never be computed, or its id is that of another in the engine.
        """
        if request.request_id in self._answers:
            raise RequestError(
                f"request_id is in use: {request.request_id}. Choose another.", param="request_id"
            )
        check_request(
            request,
            max_model_len=self.max_model_len,
            kv_cache=self.kv_cache,
            encoder_cache=self.encoder_cache,
        )
        params = request.sampling_params
        sequences = [Sequence(request, index) for index in range(params.n)]
        for sequence in sequences:
            sequence.detokenizer = Detokenizer(self.tokenizer, params)
            self.scheduler.add(sequence)
        self._answers[request.request_id] = _Answer(sequences)

    def abort(self, request_id: str, *, notify: bool = True) -> None:
        """End a request now; unknown and finished ones are none of its business.

        The next step returns a last output with `finish_reason` "abort", unless `notify` is
        False: the caller has left.
        """
        answer = self._answers.get(request_id)
        if answer is None:
            return
        for sequence in answer.sequences:
            if not sequence.finished:
                sequence.finish_reason = "abort"
                self.scheduler.finish(sequence)
                answer.tell(CompletionOutput(sequence.index, finish_reason="abort"))
        if notify:
            self._changed[request_id] = answer
        else:
            self._changed.pop(request_id, None)
            del self._answers[request_id]

    def _launch(self, scheduled: ScheduledBatch) -> None:
        """Start a step, and count what it computes and samples as if it were there."""
        if not scheduled:
            return
        start = self._now()
        launched = self.runner.launch(scheduled)
        self._in_flight.append(_InFlight(scheduled, launched, self._now() - start))
        for share in scheduled.sequences:
            sequence = share.sequence
            end = share.start + share.num_new_tokens  # no properties: this runs for each
            sequence.num_computed_tokens = end
            if share.samples:
                request = sequence.request
                max_tokens = request.sampling_params.max_tokens or 0
                if end + 1 < len(request.prompt_token_ids) + max_tokens:
                    sequence.token_ids.append(UNKNOWN_TOKEN)
                else:
                    self.scheduler.retire(sequence)

    def _process_in_flight(self, *, but: int = 0) -> None:
        """Process the steps in flight, up to the last `but` of them."""
        while self._in_flight:
            if len(self._in_flight) <= but and not self._in_flight[-1].holds_up_the_next:
                return
            step = self._in_flight[0]
            start = self._now()
            result = step.launched.result()
            step.seconds += self._now() - start
            self._in_flight.popleft()
            self._observe(step, result)
            self.process(step.scheduled, result)

    def _observe(self, step: _InFlight, result: StepResult) -> None:
        """Tell the pace how long a step took, if nothing was encoded in it.

        By the clock that is the time in which the host could do nothing else. What fails may
        have computed nothing.
        """
        pace, scheduled = self.scheduler.pace, step.scheduled
        encodes = scheduled.encode or scheduled.encode_slice is not None
        if pace is None or self._clock is None or encodes or not scheduled.sequences:
            return
        if all(token.error is None for token in result.tokens):
            pace.observe(scheduled.num_tokens, step.seconds)

    def _now(self) -> float:
        return self._clock() if self._clock is not None else 0.0

    def process(self, scheduled: ScheduledBatch, result: StepResult) -> None:
        """Take a step's tokens: append, stop, detokenize."""
        self._num_steps += bool(scheduled.sequences)
        if scheduled.encode_slice is not None and result.slice_is_last:
            self.encoder_cache.complete()
        for share, token in zip(scheduled.sequences, result.tokens, strict=True):
            if token.error is not None:
                self.scheduler.distrust(needed_keys(share))
            if share.sequence.finished:
                continue  # aborted since, failed with a sibling, or at its end a step before
            if token.error is not None:
                self._fail(share.sequence.request, token.error)
                continue
            self.kv_cache.keep(share.sequence, share.start, share.end)
            if share.samples:
                try:
                    self._take(share, token)
                except Exception as error:  # a tokenizer may choke on what this model says
                    self._fail(share.sequence.request, explain(error))

    def stats(self) -> EngineStats:
        """Gauges of this moment and counters since the start."""
        return EngineStats(
            num_running=len(self.scheduler.running),
            num_waiting=len(self.scheduler.waiting),
            num_used_blocks=self.kv_cache.num_used_blocks,
            num_blocks=self.kv_cache.num_blocks,
            num_kept_blocks=self.kv_cache.num_kept_blocks,
            num_prefix_queries=self.kv_cache.num_queried_tokens,
            num_prefix_hits=self.kv_cache.num_hit_tokens,
            encoder_rows=self.encoder_cache.num_rows,
            max_encoder_rows=self.encoder_cache.max_rows,
            num_encoder_hits=self.encoder_cache.num_hits,
            num_encodes=self.encoder_cache.num_encodes,
            num_preemptions=self.scheduler.num_preemptions,
            num_prompt_tokens=self._num_prompt_tokens,
            num_generation_tokens=self._num_generation_tokens,
            num_steps=self._num_steps,
            num_drafts=self._num_drafts,
            num_draft_tokens=self._num_draft_tokens,
            num_accepted_tokens=self._num_accepted_tokens,
        )

    def _take(self, share: ScheduledSequence, token: SampledToken) -> None:
        """Append what a step sampled for one sequence: each token may be the last."""
        sequence, position = share.sequence, share.end
        self._num_drafts += bool(share.draft_token_ids)
        self._num_draft_tokens += len(share.draft_token_ids)
        for accepted in token.accepted:
            self._put(sequence, accepted, position)
            self._num_accepted_tokens += 1
            if sequence.finished:
                return  # the answer ends inside the draft: the rest is dropped
            self.kv_cache.keep(sequence, position, position + 1)  # computed as a part of the draft
            position += 1
            sequence.num_computed_tokens = position
        self._put(sequence, token, position)
        if share.draft_token_ids:
            self.kv_cache.free_unused(sequence)  # those that only a rejected draft needed

    def _put(self, sequence: Sequence, token: SampledToken, position: int) -> None:
        """Put a sampled token in its place, which may hold an unknown one, and report it."""
        token_id = token.token_id
        assert token_id is not None
        params = sequence.request.sampling_params
        assert params.max_tokens is not None  # add() saw to it
        answer = self._answers[sequence.request.request_id]
        num_output_tokens = position + 1 - sequence.num_prompt_tokens  # those behind are unknown
        if num_output_tokens == 1:  # its prompt is through; recomputed ones don't count
            self._num_prompt_tokens += sequence.num_prompt_tokens
            if sequence is answer.sequences[0]:  # no other of the request starts earlier
                answer.times = _times_of(sequence)
        sequence.token_ids[position : position + 1] = [token_id]
        self._num_generation_tokens += 1
        new = CompletionOutput(sequence.index, token_ids=[token_id])
        if params.logprobs is not None:
            new.logprobs = [self._logprobs(token, token_id)]

        may_stop = num_output_tokens > params.min_tokens
        if may_stop and not params.ignore_eos and token_id in sequence.request.eos_token_ids:
            new.finish_reason = "stop"
        elif may_stop and token_id in params.stop_token_ids:
            new.finish_reason, new.stop_reason = "stop", token_id
        silent = new.finish_reason is not None and not params.include_stop_str_in_output
        # max_tokens never reaches past max_model_len: add() saw to that too.
        if new.finish_reason is None and num_output_tokens >= params.max_tokens:
            new.finish_reason = "length"

        new.text, stop = sequence.detokenizer.push(
            None if silent else token_id, last=new.finish_reason is not None, may_stop=may_stop
        )
        if stop is not None:
            new.finish_reason, new.stop_reason = "stop", stop
        answer.tell(new)
        self._changed[sequence.request.request_id] = answer
        if new.finish_reason is not None:
            sequence.finish_reason = new.finish_reason
            del sequence.token_ids[position + 1 :]  # what a step in flight samples behind its end
            self.scheduler.finish(sequence)

    def _logprobs(self, token: SampledToken, token_id: int) -> dict[int, Logprob]:
        """The chosen token's entry, then the likeliest ones'."""
        assert token.logprob is not None
        entries = {
            token_id: Logprob(token.logprob, token.rank, token_text(self.tokenizer, token_id))
        }
        for rank, (other_id, logprob) in enumerate(token.top_logprobs or (), start=1):
            text = token_text(self.tokenizer, other_id)
            entries.setdefault(other_id, Logprob(logprob, rank, text))
        return entries

    def _fail(self, request: Request, error: ErrorInfo) -> None:
        """End a request, with all its sequences. What is new of it isn't told: it is in vain."""
        answer = self._answers[request.request_id]
        answer.error = error
        answer.news.clear()
        self._changed[request.request_id] = answer
        for sequence in answer.sequences:
            if not sequence.finished:
                self.scheduler.finish(sequence)

    def _take_news(self) -> list[RequestOutput]:
        """What is new: of answers that begin or end, and once in `output_interval` of all."""
        outputs: list[RequestOutput] = []
        kept: dict[str, _Answer] = {}
        now = time.monotonic() if self._output_interval else 0.0
        of_all = now - self._told_all >= self._output_interval
        if of_all:
            self._told_all = now
        for request_id, answer in self._changed.items():
            finished = all(sequence.finished for sequence in answer.sequences)
            if not (of_all or finished or answer.times):
                kept[request_id] = answer
                continue
            output = RequestOutput(request_id, list(answer.news.values()), finished, answer.error)
            # Of the first: the others of a request find what the first has computed.
            output.num_cached_tokens = answer.sequences[0].num_cached_tokens or 0
            output.times = answer.times
            outputs.append(output)
            answer.news, answer.times = {}, None
            if finished:
                del self._answers[request_id]
        self._changed = kept
        return outputs


def _times_of(sequence: Sequence) -> RequestTimes:
    """The times of a sequence that has just been given its first token."""
    assert sequence.start_time is not None  # it was scheduled
    queue = sequence.start_time - sequence.arrival_time
    return RequestTimes(queue, time.monotonic() - sequence.start_time)
