"""When graphs are captured, and what becomes of a model for which it fails.

All ranks capture the same graphs, in the same order, or none does.
"""

from __future__ import annotations

import gc
import logging
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from mm_engine.errors import StartupError
from mm_engine.worker.graphs import RECORDERS, CaptureFailed, ladder
from mm_engine.worker.memory import readable
from mm_engine.worker.model_runner import ModelRunner

logger = logging.getLogger(__name__)


class GraphCapture:
    """The way from a loaded model to its graphs: `try_out`, then the KV cache, then `capture`."""

    def __init__(self, runner: ModelRunner, *, enforce_eager: bool, progress: bool) -> None:
        self._runner = runner
        self._progress = progress
        self._seconds = 0.0
        self._recorder = RECORDERS.get(runner.device.type)
        self.wanted = self._recorder is not None
        if self._recorder is None:
            return
        self._what = self._recorder.what
        # The largest first: the others fit in it.
        self._sizes = ladder(self._recorder, runner.max_graphed)[::-1]
        why = self._recorder.unfit(runner.opened.ctx.shard.size)
        if enforce_eager:
            why = "--enforce-eager"
        elif why is None and not runner.backend.captures:
            why = f"attention by {runner.backend.name} can't be captured"
        if why is not None:
            self.wanted = False
            logger.info("No %s: %s.", self._what, why)

    def try_out(self) -> None:
        """Capture two over a cache of one block, to know what all take, and give them up again.

        The estimate is vLLM's: the largest, and for each other what the second took beside it. The
        KV cache, over which they are captured for good, gets what that leaves.

        Raises:
            StartupError: they don't fit.
        """
        if not self.wanted:
            return
        self._runner.init_cache(1)
        self._capture(self._sizes[:2])
        self._runner.end_trial()

    def capture(self) -> None:
        """Capture them over the KV cache, which is there to stay: all, or the largest alone where
        the others come with the steps that want them.

        Raises:
            StartupError: they don't fit.
        """
        if not self.wanted:
            return
        assert self._recorder is not None
        on_demand = self._recorder.on_demand
        self._capture(self._sizes[:1] if on_demand else self._sizes)
        graphs = self._runner.graphs
        if graphs is None:
            return
        self._runner.memory.graphs = sum(graphs.taken)
        logger.info(
            "%s%s: %d, for steps of 1 to %d decodes%s; %.1f s, %s.",
            self._what[0].upper(),
            self._what[1:],
            len(self._sizes),
            self._sizes[0],
            ", each made when a step first takes it" if on_demand else "",
            self._seconds,
            readable(self._runner.memory.graphs),
        )

    def _capture(self, sizes: list[int]) -> None:
        start = time.perf_counter()
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            console=Console(stderr=True),
            disable=not self._progress,
        ) as bar:
            for size in bar.track(sizes, description=f"Capturing {self._what}"):
                try:
                    self._runner.capture_next(size)
                except CaptureFailed as error:
                    self._give_up(size, error)
                    break
        self._seconds += time.perf_counter() - start

    def _give_up(self, size: int, error: CaptureFailed) -> None:
        """Go on without graphs, if it isn't for want of memory."""
        self._runner.drop_graphs()
        gc.collect()  # frames of the exception hold the graphs, and they their memory
        if error.no_memory:
            raise StartupError(
                f"{self._what} don't fit in memory: the one for {size} sequences ({error}). Lower "
                "--max-num-seqs or --gpu-memory-utilization, or do without them: --enforce-eager."
            ) from error
        self.wanted = False
        assert self._recorder is not None
        logger.log(
            self._recorder.missed,
            "%s%s can't be captured: %s. Decodes run without them, as with --enforce-eager.",
            self._what[0].upper(),
            self._what[1:],
            error,
        )
