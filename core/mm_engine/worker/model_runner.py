"""One step on the device: encode, merge by position, forward, sample."""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from mm_engine_kernels import ops
from torch import Tensor

from mm_engine.config import EngineConfig
from mm_engine.errors import EngineDead, MMEngineError, PluginError, StartupError
from mm_engine.outputs import ErrorInfo
from mm_engine.plugins.blame import one_line
from mm_engine.request import Item, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import SampledToken, ScheduledBatch, ScheduledSequence, StepResult
from mm_engine.sequence import Sequence as EngineSequence
from mm_engine.worker import rank_wire
from mm_engine.worker.batch import ForwardBatch, build_batch, slots_of
from mm_engine.worker.dummies import most_decodes
from mm_engine.worker.encoder import Encoder
from mm_engine.worker.grammars import Grammars
from mm_engine.worker.graphs import CaptureFailed
from mm_engine.worker.launched import Finite, LaunchedStep
from mm_engine.worker.loader import OpenedModel, pick_device
from mm_engine.worker.model_shard import ModelShard
from mm_engine.worker.rank_group import RankGroup
from mm_engine.worker.ranks import Ranks
from mm_engine.worker.sampler import Sampler
from mm_engine.worker.transfers import to_device
from mm_engine.worker.verification import launch_shares

LONG_STEP = 0.2  # seconds


class ModelRunner(ModelShard):
    """Rank 0's part of the model, and what only one process does: encode, embed, sample.

    It holds no state of any request.
    """

    def __init__(self, opened: OpenedModel, config: EngineConfig) -> None:
        size = config.tensor_parallel_size
        device = pick_device(config)
        self.ranks = Ranks(config, opened.plugin.record) if size > 1 else None
        self.group: RankGroup | None = None
        try:
            if self.ranks is not None:
                self.ranks.wait(rank_wire.Opened)
                self.group = self._meet(self.ranks, device, config)
                self.ranks.join(self.group)
                opened.ctx.shard.join(self.group)
            super().__init__(opened, config)
            if self.ranks is not None:
                self._compare(self.ranks.wait(rank_wire.Loaded))
        except BaseException:
            self.close()
            raise
        self.config = config
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self._embeds_dtype = self.dtype  # what a model's `embed_tokens` makes may be of another
        self.encoder = Encoder(self.model, opened.plugin, self.hidden_size, self.device, self.dtype)
        self.sampler = Sampler(config.seed, Grammars.of(opened))

    @staticmethod
    def _meet(ranks: Ranks, device: torch.device, config: EngineConfig) -> RankGroup:
        """Join the ranks, which have opened the model."""
        size = config.tensor_parallel_size
        try:
            return RankGroup(device, 0, size, ranks.store, config.step_timeout)
        except RuntimeError as error:
            try:
                ranks.check()
            except EngineDead:
                raise ranks.refusal() from error
            raise StartupError(
                f"the tensor-parallel ranks don't find each other: {one_line(error)}."
            ) from error

    def close(self) -> None:
        """End the other ranks."""
        self.graphs = None  # NCCL waits for graphs that hold its calls
        if self.ranks is not None:
            self.ranks.close()

    def check(self) -> None:
        """Raise `EngineDead` if a rank is gone."""
        if self.ranks is not None:
            self.ranks.check()

    def _compare(self, others: list[rank_wire.Loaded]) -> None:
        """Raise `StartupError` unless the others compute attention as this rank does."""
        own = (self.backend.name, self.block_size)
        for other in others:
            if (other.backend, other.block_size) != own:
                raise StartupError(
                    f"ranks differ in their attention backend: {own[0]} on rank 0, "
                    f"{other.backend} on rank {other.rank}. Use cards of one kind, or name one: "
                    f"--attention-backend {own[0]}."
                )

    def init_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache, in each rank."""
        if self.ranks is not None:
            self.ranks.send(rank_wire.InitCache(num_blocks))
        super().init_cache(num_blocks)

    def available_memory(self) -> int:
        """Bytes left for the KV cache in each rank, after what `profile` saw at the peak."""
        available = self.memory.available()
        if self.ranks is None:
            return available
        self.ranks.send(rank_wire.Report())
        others = self.ranks.wait(rank_wire.Available)
        return min(available, *(other.num_bytes for other in others))

    def capture_next(self, size: int) -> None:
        """Capture the graph for `size` sequences, in each rank.

        Raises:
            CaptureFailed: one of them can't.
        """
        failure: CaptureFailed | None = None
        if self.ranks is not None:
            dtype = str(self._embeds_dtype).removeprefix("torch.")
            self.ranks.send(rank_wire.Capture(size, dtype))
        try:
            self.capture_graph(size, self._embeds_dtype)
        except CaptureFailed as error:
            failure = error
        for other in self.ranks.wait(rank_wire.Captured) if self.ranks is not None else ():
            if other.why_not and failure is None:
                told = f"{other.why_not}, in rank {other.rank}"
                failure = CaptureFailed(told, no_memory=other.no_memory)
        if failure is not None:
            raise failure

    def drop_graphs(self) -> None:
        """Run every step eagerly from now on, in each rank."""
        super().drop_graphs()
        if self.ranks is not None and self.group is not None:
            self.ranks.send(rank_wire.DropGraphs(self.group.num_calls))

    def end_trial(self) -> None:
        """Give up the graphs that were tried, and their cache, in each rank."""
        super().end_trial()
        if self.ranks is not None:
            self.ranks.send(rank_wire.EndTrial())

    def profile(self, requests: Sequence[Request], *, max_num_seqs: int | None = None) -> None:
        """Run the dummy `requests` whole, to see the peak of memory and check the plugin's counts.

        Then as many decodes as a step may hold, over the same tokens: those sample most rows.
        There are `max_num_seqs` at most, which is the config's by default.

        Raises:
            PluginError: the plugin's encoder or model broke its contract on its own dummy data.
        """
        decodes = min(max_num_seqs or self.config.max_num_seqs, self.config.max_num_seqs)
        config = replace(self.config, max_num_seqs=decodes)
        for request in requests:
            # A step never holds more tokens than this; a long dummy is run in such chunks.
            sequence = EngineSequence(request)
            num_blocks = -(-sequence.num_tokens // self.block_size)
            room = self.config.kv_cache_memory or self.memory.available()
            self.init_cache(num_blocks)
            sequence.block_table = list(range(num_blocks))
            with self._measured():
                # Together, as a step that holds them all does: that is the encoder's peak.
                errors = self.encoder.encode(request.items)
                if errors:
                    raise next(iter(errors.values()))
                while sequence.num_uncomputed_tokens:
                    num_new = min(sequence.num_uncomputed_tokens, self.max_num_batched_tokens)
                    self._try(ScheduledBatch((ScheduledSequence(sequence, num_new),)))
                    sequence.num_computed_tokens += num_new
                max_tokens = room // self.cache_bytes_per_block * self.block_size
                self._try(most_decodes(sequence, config, max_tokens=max_tokens))
            self.encoder.drop([item.content_key for item in request.items])
        self.kv_caches = []

    def _try(self, batch: ScheduledBatch) -> None:
        """Run a step of dummies; what would fail one of them is raised."""
        for token in self.run(batch).tokens:
            if token.error is not None:
                raise PluginError(token.error.message)

    @contextmanager
    def _measured(self) -> Iterator[None]:
        """Note the peak of memory inside, in each rank; their caches are no part of it."""
        if self.ranks is not None:
            self.ranks.send(rank_wire.Measure(ends=False))
        with self.memory.measured():
            yield
        if self.ranks is not None:
            self.ranks.send(rank_wire.Measure(ends=True))

    def time_steps(self, max_tokens: int) -> Iterator[tuple[int, float]]:
        """How long steps of 1, 2, 4, … up to `max_tokens` tokens take: pairs (tokens, seconds).

        Each runs over one sequence's first tokens, in the KV cache's first blocks, which are zeroed
        again. Short ones run twice, and the better time counts; where steps are long, so are the
        strides from one size to the next. None is replayed: that would make the step of one token
        look cheap beside all others, for what the second brings with it once.
        """
        num_tokens = 1
        while num_tokens <= max_tokens:
            # Any ids will do that aren't all the same: a mixture of experts would notice.
            ids = tuple(i * 7919 % self.vocab_size for i in range(num_tokens))
            sequence = EngineSequence(Request("timing", ids, SamplingParams(temperature=0.0)))
            sequence.block_table = list(range(-(-num_tokens // self.block_size)))
            batch = ScheduledBatch((ScheduledSequence(sequence, num_tokens),))
            best = float("inf")
            for _ in range(2):
                before = time.perf_counter()
                with self._without_graphs():
                    self.run(batch)
                best = min(best, time.perf_counter() - before)
                if best > LONG_STEP and num_tokens > 1:  # the first of all was a cold one
                    break
            self._clean(slots_of(batch.sequences[0], self.block_size))
            yield num_tokens, best
            num_tokens *= 8 if best > LONG_STEP else 2

    @contextmanager
    def _without_graphs(self) -> Iterator[None]:
        graphs, self.graphs = self.graphs, None
        try:
            yield
        finally:
            self.graphs = graphs

    @property
    def slices_images(self) -> bool:
        """Whether `encode_slice` bounds time: elsewhere a slice would only be launched in it."""
        return self.device.type == "cpu"

    def check_keywords(self, item: Item) -> None:
        """Hold the model's method for an item to the mapper's tensors, without running it.

        Raises:
            PluginError: there is none, or it doesn't take them as keywords.
        """
        method = f"embed_{item.modality}s"
        if not callable(getattr(self.model, method, None)):
            raise self.opened.plugin.blame(method, "expected a method of the model, got none")
        signature = inspect.signature(getattr(self.model, method))
        try:
            signature.bind(**item.tensors)
        except TypeError:
            fact = f"expected the mapper's tensors {sorted(item.tensors)} as keywords"
            got = f"got {list(signature.parameters)}"
            raise self.opened.plugin.blame(method, f"{fact}, {got}") from None

    def run(self, batch: ScheduledBatch) -> StepResult:
        """Run one step to its end: `launch`, and its result."""
        return self.launch(batch).result()

    def launch(self, batch: ScheduledBatch) -> LaunchedStep:
        """Start one step; a device may still be computing it, and those before it, on return.

        A sequence whose newest token is `UNKNOWN_TOKEN` goes on with the one that the step before
        sampled for it. A sequence whose image can't be encoded, or whose hidden states or logits
        hold NaN, gets an error; the others run on without it. Where only a draft may be at fault,
        the step is computed again without it: with drafts the device is waited for.
        """
        with torch.inference_mode():
            self.encoder.drop(batch.evict)
            if batch.encode_slice is not None:
                self.encoder.encode_slice(batch.encode_slice.item, batch.encode_slice.seconds)
            errors = self.encoder.encode(self._to_encode(batch))
            tokens = [SampledToken() for _ in batch.sequences]
            running: list[int] = []
            for i, scheduled in enumerate(batch.sequences):
                error = self._missing(scheduled, errors)
                if error is None:
                    running.append(i)
                else:
                    tokens[i] = SampledToken(error=error)
            launched = LaunchedStep(
                StepResult(tokens, self.encoder.slice_is_last), self.blame_nan, self.check
            )
            if not running:
                return launched
            forward = build_batch([batch.sequences[i] for i in running], self.block_size)
            hidden, logits = self._compute(forward)
            finite = Finite.of(hidden, logits, forward)
            drafting = {i for i, share in enumerate(forward.scheduled) if share.draft_token_ids}
            if drafting:
                # NaN of a draft reaches the rows before it; nothing is sampled yet.
                broken = finite.broken()
                doubtful = {running[i] for i in drafting & broken.keys()}
                if doubtful:
                    for i in broken:
                        self._clean(forward.slots(i))
                    return self.launch(_without_drafts(batch, doubtful))
            launched.computed(running, forward, finite)
            if logits is not None:
                indices = list(dict.fromkeys(forward.sampled))
                shares = [forward.scheduled[i] for i in indices]
                launched.sampled(indices, launch_shares(self.sampler, logits, shares))
            return launched

    def blame_nan(self, method: str, slots: list[int]) -> ErrorInfo:
        """What a request is told whose share is NaN; what it wrote to `slots` is zeroed."""
        self._clean(slots)
        fact = "expected finite numbers for this request, got NaN or infinity"
        return ErrorInfo("PluginError", str(self.opened.plugin.blame(method, fact)))

    def _compute(self, forward: ForwardBatch) -> tuple[Tensor, Tensor | None]:
        """Hidden states and logits of a step, which all ranks compute together."""
        input_ids = forward.input_ids(self.device)
        embeds = self._embed(forward, input_ids)
        self._embeds_dtype = embeds.dtype
        graph = 0
        if self.graphs is not None and self.graphs.dtype == embeds.dtype:
            graph = self.graphs.size_for(forward.layout)
        if self.ranks is None or self.group is None:
            return self.compute(input_ids, embeds, forward.layout, graph)
        with self.ranks.together():
            dtype = str(embeds.dtype).removeprefix("torch.")
            self.ranks.send(rank_wire.Run(forward.layout, dtype, graph))
            self.group.broadcast(input_ids)
            embeds = self.group.broadcast(embeds)
            return self.compute(input_ids, embeds, forward.layout, graph)

    def _embed(self, forward: ForwardBatch, input_ids: Tensor) -> Tensor:
        """`[T, hidden]` embeddings, those of images in their places."""
        with self.blamed("embed_tokens"):
            embeds: Tensor = self.model.embed_tokens(input_ids)
            wanted = [len(input_ids), self.hidden_size]
            self.check_shape("embed_tokens", "embeddings", embeds, wanted)
        if forward.merges:
            rows = [
                self.encoder.features[item.content_key][first : first + num]
                for item, first, _, num in forward.merges
            ]
            places = [place for _, _, to, num in forward.merges for place in range(to, to + num)]
            positions = to_device(places, self.device)
            embeds = ops.merge_by_position(embeds, torch.cat(rows), positions)
        return embeds

    def _to_encode(self, batch: ScheduledBatch) -> list[Item]:
        """The items that the plan names, and those that a step which was cut short has lost."""
        items = {item.content_key: item for item in batch.encode}
        for scheduled in batch.sequences:
            for item in _touched(scheduled):
                if item.content_key not in self.encoder.features:
                    items.setdefault(item.content_key, item)
        return list(items.values())

    def _missing(
        self, scheduled: ScheduledSequence, errors: dict[str, MMEngineError]
    ) -> ErrorInfo | None:
        """The error of an item that this share touches and that has no features."""
        for item in _touched(scheduled):
            if item.content_key in errors:
                error = errors[item.content_key]
                return ErrorInfo(type(error).__name__, str(error))
            known = len(self.encoder.features[item.content_key])
            if known != item.placeholder.length:
                fact = (
                    f"expected {known} placeholder tokens for {item.modality} "
                    f"{item.placeholder.item}, as many as its features have in another prompt, "
                    f"got {item.placeholder.length}"
                )
                blamed = self.opened.plugin.blame("input_processor", fact)
                return ErrorInfo("PluginError", str(blamed))
        return None

    def _clean(self, slots: list[int]) -> None:
        """Zero what a share of a step wrote, in each rank: masked NaN would still spread."""
        if self.ranks is not None:
            self.ranks.send(rank_wire.Clean(slots))
        self.clean(to_device(slots, self.device))


def _without_drafts(batch: ScheduledBatch, indices: set[int]) -> ScheduledBatch:
    """The plan without the drafts of these of its sequences; what it encodes is encoded."""
    shares = tuple(
        share._replace(draft_token_ids=()) if i in indices else share
        for i, share in enumerate(batch.sequences)
    )
    return replace(batch, sequences=shares, encode_slice=None, evict=())


def _touched(scheduled: ScheduledSequence) -> list[Item]:
    """The items of which some rows fall into this share."""
    return [
        item
        for item in scheduled.sequence.request.items
        if item.placeholder.offset < scheduled.end and item.placeholder.end > scheduled.start
    ]
