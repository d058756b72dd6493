"""Graphs: the model's part of a step of decodes, captured once and replayed.

A graph repeats what was launched when it was captured, over the same tensors. So there is one for
each size of a ladder, and a step fills the tensors and runs the next larger one, padded.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from mm_engine_kernels import ops
from torch import Tensor

from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.models.weights import does_not_fit
from mm_engine.plugins.blame import one_line
from mm_engine.worker.batch import StepLayout
from mm_engine.worker.transfers import fill

if TYPE_CHECKING:
    from mm_engine.worker.model_shard import ModelShard

logger = logging.getLogger(__name__)


class CaptureFailed(Exception):
    """A graph can't be captured; the message says why. `no_memory`: it doesn't fit."""

    def __init__(self, why: str, *, no_memory: bool) -> None:
        super().__init__(why)
        self.no_memory = no_memory

    @classmethod
    def of(cls, error: BaseException) -> CaptureFailed:
        """What is told of `error`: a capture that is broken off raises once more at its end, so it
        is the first of those that it came of."""
        first, no_memory = error, False
        cause: BaseException | None = error
        while cause is not None:
            first = cause
            no_memory = no_memory or does_not_fit(cause) or "out of memory" in str(cause)
            cause = cause.__cause__ or cause.__context__
        return cls(one_line(first).rstrip("."), no_memory=no_memory)


class Recorder(Protocol):
    """Turns what a function launches into something that launches it again."""

    what: ClassVar[str]  # what it makes, for messages
    missed: ClassVar[int]  # level of the log line when a model can't be captured
    sizes: ClassVar[tuple[int, ...]]  # that are worth a graph, ascending; the last is the most
    on_demand: ClassVar[bool]  # startup makes the largest alone, and a step the one that it lacks

    def __init__(self, device: torch.device) -> None:
        """For the tensors of `device`."""

    @classmethod
    def unfit(cls, num_ranks: int) -> str | None:
        """Why it isn't for a model in so many ranks; None: it is."""
        ...

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Call `function`, more than once; what is returned does to its tensors what it did."""
        ...


class CudaRecorder:
    """Captures into CUDA graphs that share their memory: they never run at the same time."""

    what: ClassVar = "CUDA graphs"
    missed: ClassVar = logging.WARNING
    # vLLM's, with which padding costs a step little, and 64 sequences take 11 graphs. In larger
    # steps the device is busy for longer than launching takes.
    sizes: ClassVar = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
    on_demand: ClassVar = False

    @classmethod
    def unfit(cls, num_ranks: int) -> str | None:
        """See `Recorder`."""
        return None

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`."""
        outside = torch.cuda.current_stream()
        graph = torch.cuda.CUDAGraph()
        try:
            self._stream.wait_stream(outside)
            with torch.cuda.stream(self._stream):
                # The first run compiles kernels and makes handles, which a capture can't.
                function()
            outside.wait_stream(self._stream)
            # Not "global": NCCL's own thread looks at its events meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                function()
        except BaseException:
            torch.cuda.set_stream(outside)  # a capture that fails leaves its own in force
            # And before torch 2.13 the allocator capturing. PyTorch has no public name for it.
            with suppress(RuntimeError, AttributeError):
                torch._C._cuda_endAllocateToPool(outside.device_index, self._pool)
            raise
        replay: Callable[[], None] = graph.replay
        return replay


class CpuRecorder:
    """Keeps the calls of the C++ kernels, which costs next to nothing, and skips Python's part."""

    what: ClassVar = "decode graphs"
    missed: ClassVar = logging.INFO  # they save little: many models do without
    # A row costs what it costs: padding wouldn't be free, as it is on a card.
    sizes: ClassVar = (*range(1, 9), *range(10, 17, 2), *range(20, 33, 4))
    on_demand: ClassVar = True  # some 50 ms each, once, instead of all of them at every start

    def __init__(self, device: torch.device) -> None:
        from mm_engine_kernels.cpu.recording import Recorder

        self._record = Recorder()

    @classmethod
    def unfit(cls, num_ranks: int) -> str | None:
        """See `Recorder`."""
        if num_ranks > 1:
            return "ranks on a CPU compute without them"
        if ops.chosen("cpu").name != "cpp":
            return "only the C++ kernels can be recorded"
        return None

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """See `Recorder`."""
        return self._record(function)


#: What captures on each type of device. On others steps run eagerly, and nobody expects more.
RECORDERS: dict[str, type[Recorder]] = {"cuda": CudaRecorder, "cpu": CpuRecorder}


def ladder(recorder: type[Recorder], max_num_seqs: int) -> list[int]:
    """The sizes that are captured for up to so many sequences, ascending; that is one of them."""
    top = min(max_num_seqs, recorder.sizes[-1])
    return [*(size for size in recorder.sizes if size < top), top]


class DecodeGraphs:
    """One rank's graphs over its KV cache, and the tensors that they read and write."""

    def __init__(self, shard: ModelShard, dtype: torch.dtype) -> None:
        """`dtype` is that of the embeddings. Nothing is captured yet: the largest comes first."""
        self._free = shard.memory.free()
        self.taken: list[int] = []  # bytes of each graph, in the order of capture
        recorder = RECORDERS[shard.device.type]
        self.sizes = ladder(recorder, shard.max_graphed)
        self.dtype = dtype
        self.max_blocks = -(-shard.max_model_len // shard.block_size)  # of a sequence
        self._shard = shard
        self._record = recorder(shard.device)
        self._replays: dict[int, Callable[[], None]] = {}
        self._captured: list[int] = []  # sizes, ascending
        top, device = self.sizes[-1], shard.device
        with torch.inference_mode():
            self._ids = torch.zeros(top, dtype=torch.int64, device=device)
            self._positions = torch.zeros(top, dtype=torch.int64, device=device)
            self._slots = torch.full((top,), -1, dtype=torch.int64, device=device)
            self._contexts = torch.zeros(top, dtype=torch.int32, device=device)
            self._tables = torch.zeros(top, self.max_blocks, dtype=torch.int32, device=device)
            self._starts = torch.arange(top + 1, dtype=torch.int32, device=device)
            self._embeds = torch.zeros(top, shard.hidden_size, dtype=dtype, device=device)
        self._hidden: Tensor | None = None  # [top, hidden]: of the step that was replayed last

    def capture(self, size: int) -> None:
        """Capture the graph for steps of up to `size` sequences.

        Raises:
            CaptureFailed: the model does what can't be captured, such as waiting for the device,
                or the memory is too small.
        """
        try:
            with torch.inference_mode():
                # All rows are padding: nothing is written to the cache.
                fill(self._slots[:size], [-1] * size)
                fill(self._contexts[:size], [0] * size)
                self._replays[size] = self._record(lambda: self._forward(size))
        except Exception as error:
            raise CaptureFailed.of(error) from error
        self._captured = sorted(self._replays)
        free = self._shard.memory.free()
        self.taken.append(self._free - free)
        self._free = free

    def size_for(self, layout: StepLayout) -> int:
        """The graph that runs this step, which is captured first if it is to be; 0: none does."""
        num = len(layout.positions)
        if num != len(layout.query_lens) or num > self.sizes[-1]:
            return 0
        if len(layout.block_tables[0]) > self.max_blocks:
            return 0
        sizes = self.sizes if self._record.on_demand else self._captured
        place = bisect_left(sizes, num)
        if place == len(sizes):
            return 0
        size = sizes[place]
        if size not in self._replays:
            try:
                self.capture(size)
            except CaptureFailed as error:
                logger.info("No %s of %d decodes: %s.", self._record.what, size, error)
                self.sizes.remove(size)
                return self.size_for(layout)
        return size

    def run(self, size: int, input_ids: Tensor, embeds: Tensor, layout: StepLayout) -> Tensor:
        """Hidden states `[T, hidden]` of a step, by the graph that `size_for` has named.

        The next run overwrites them.
        """
        num = len(layout.positions)
        padding, width = size - num, len(layout.block_tables[0])
        self._ids[:num].copy_(input_ids)
        self._embeds[:num].copy_(embeds)
        if padding:
            self._embeds[num:size].zero_()  # what is left there may be NaN
        fill(self._positions[:size], layout.positions + [0] * padding)
        fill(self._slots[:size], layout.slots + [-1] * padding)
        fill(self._contexts[:size], layout.context_lens + [0] * padding)
        fill(self._tables[:num, :width], layout.block_tables)
        self._replays[size]()
        assert self._hidden is not None
        return self._hidden[:num]

    def _forward(self, size: int) -> None:
        shard = self._shard
        metadata = AttentionMetadata(
            shard.backend,
            shard.kv_caches,
            slot_mapping=self._slots[:size],
            block_tables=self._tables[:size],
            query_starts=self._starts[: size + 1],
            contexts=self._contexts[:size],
            max_query_len=1,
            max_context_len=shard.max_model_len,
        )
        hidden = shard.hidden_states(
            self._ids[:size], self._embeds[:size], self._positions[:size], metadata
        )
        if self._hidden is None:
            self._hidden = hidden.new_empty((self.sizes[-1], shard.hidden_size))
        # One place for all sizes: what a graph's own pool holds is the next graph's to overwrite.
        self._hidden[:size].copy_(hidden)
