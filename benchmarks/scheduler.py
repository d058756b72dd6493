"""What a step's planning costs, without a model: 256 decodes, and a queue of any length.

    python benchmarks/scheduler.py [--json out.json] [--plot out.png]

The real scheduler, KV cache and encoder cache; a step is `schedule` and the notes on its result.
Each sequence has a prompt of 1,000 tokens, 576 of them an image. Requests are admitted one a step,
each in the place of one that has ended; their cost is the median of what that step takes more than
the one before it, in which nobody comes or goes: to hash the prompt's blocks, to look them up, to
plan the first chunk, and to take back the blocks of the one that has ended. Times are this
thread's on the processor: what else the machine does is left out, but for the caches and cores that
it shares.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from mm_engine.engine.encoder_cache import EncoderCache
from mm_engine.engine.kv_cache import KVCache
from mm_engine.engine.scheduler import Scheduler
from mm_engine.request import Item, PlaceholderRange, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import ScheduledBatch, Sequence
from record import begin, write

NUM_TOKENS, NUM_IMAGE_TOKENS, TEXT_BEFORE = 1000, 576, 24
BLOCK_SIZE = 16
MAX_BATCHED_TOKENS = 2048
MAX_ROWS = 128 * 2**20 // 8192  # the default 128 MiB of features of 4,096 bfloat16
QUEUES = (0, 10, 100, 1_000, 10_000)
PARAMS = SamplingParams(max_tokens=3000)


@dataclass(frozen=True)
class Figures:
    """Microseconds at one length of the queue; None where nobody waits to be admitted."""

    queue: int
    step_median: float
    step_p99: float
    admission: float | None  # of one request, nothing of it is in the cache
    admission_found: float | None  # of one request, all but its last blocks are found


class Load:
    """A scheduler with `num_running` decodes, and what it takes to go on."""

    def __init__(self, num_running: int, num_steps: int) -> None:
        num_tokens = NUM_TOKENS + BLOCK_SIZE + 4 * num_steps + 8
        num_blocks = (num_running + 4) * -(-num_tokens // BLOCK_SIZE)
        self.scheduler = Scheduler(
            KVCache(num_blocks, BLOCK_SIZE),
            EncoderCache(MAX_ROWS, MAX_BATCHED_TOKENS),
            max_num_batched_tokens=MAX_BATCHED_TOKENS,
            max_num_seqs=num_running,
        )
        self._number = 0
        for _ in range(num_running):
            self.scheduler.add(self.new())
        while self.scheduler.waiting or any(
            sequence.num_output_tokens == 0 for sequence in self.scheduler.running
        ):
            self.step()

    def new(self, image: str | None = None) -> Sequence:
        """A sequence of an image and a text of its own, or of a given image and its text."""
        number = self._number = self._number + 1
        own = number if image is None else 0
        # Lengths differ, or all would come to the end of a block in the same step.
        ids = (own, *range(1, NUM_TOKENS + (number % BLOCK_SIZE if image is None else 0)))
        place = PlaceholderRange("image", 0, TEXT_BEFORE, NUM_IMAGE_TOKENS)
        item = Item(place, image or f"image {number}", {})
        return Sequence(Request(str(number), (*ids, number), PARAMS, (item,)))

    def add_in_front(self, sequence: Sequence) -> None:
        """Queue a sequence that is to be admitted next."""
        self.scheduler.add(sequence)
        self.scheduler.waiting.remove(sequence)
        self.scheduler.waiting.put_back(sequence)

    def step(self) -> float:
        """One step; its microseconds."""
        start = time.thread_time()
        batch = self.scheduler.schedule()
        self._note(batch)
        return (time.thread_time() - start) * 1e6

    def _note(self, batch: ScheduledBatch) -> None:
        """What the engine does with a step's tokens, text and stops aside."""
        for share in batch.sequences:
            share.sequence.num_computed_tokens = share.end
            self.scheduler.kv_cache.keep(share.sequence, share.start, share.end)
            if share.samples:
                share.sequence.token_ids.append(7)

    def admission(self, num: int, image: str | None) -> float:
        """Microseconds to admit one request, each into the place of one that has ended."""
        costs = []
        for _ in range(num):
            # First, or a part would be counted here: a step looks up, and so hashes, the blocks of
            # the first that waits also where it finds no seat for it.
            plain = self.step()
            sequence = self.new(image)
            self.scheduler.finish(self.scheduler.running[0])
            # In front, where the next is taken from: the rest of the queue stays as it is.
            self.add_in_front(sequence)
            with_admission = self.step()
            assert sequence in self.scheduler.running
            assert (sequence.num_cached_tokens or 0) > NUM_IMAGE_TOKENS or image is None
            costs.append(with_admission - plain)
        return statistics.median(costs)


def measure(num_running: int, queue: int, num_steps: int) -> Figures:
    """All figures at one length of the queue."""
    load = Load(num_running, num_steps)
    for _ in range(queue):
        load.scheduler.add(load.new())
    gc.collect()
    gc.freeze()  # the queue itself, as a server does with what it has loaded
    steps = [load.step() for _ in range(num_steps)]
    admission = found = None
    if queue:
        admission = load.admission(num_steps // 4, None)
        load.admission(1, None)
        first = load.new("shared")
        load.add_in_front(first)
        load.scheduler.finish(load.scheduler.running[0])
        load.step()
        found = load.admission(num_steps // 4, "shared")
    gc.unfreeze()
    p99 = statistics.quantiles(steps, n=100)[98]
    return Figures(queue, statistics.median(steps), p99, admission, found)


def table(all_figures: list[Figures], num_running: int) -> Table:
    """The figures for people."""
    shown = Table(title=f"{num_running} running, microseconds", box=None, padding=(0, 2, 0, 0))
    for name in ("waiting", "step, median", "step, p99", "admission", "admission, prefix found"):
        shown.add_column(name, justify="right")
    for f in all_figures:
        values = (f.step_median, f.step_p99, f.admission, f.admission_found)
        shown.add_row(f"{f.queue:,}", *("-" if v is None else f"{v:,.0f}" for v in values))
    return shown


def draw(all_figures: list[Figures], title: str) -> Any:
    """Cost against the length of the queue, drawn. matplotlib comes with mm-engine[bench]."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    figure.suptitle(title, fontsize=9)
    left, right = figure.subplots(1, 2)
    queues = [f.queue for f in all_figures]
    left.plot(queues, [f.step_median for f in all_figures], "o-", label="median")
    left.plot(queues, [f.step_p99 for f in all_figures], "o--", label="p99")
    left.axhline(1000, color="#8a8a8a", linewidth=0.8, label="1 ms")
    left.set_title("a step", fontsize=9)
    admitted = [f for f in all_figures if f.admission is not None]
    for name, label in (("admission", "nothing found"), ("admission_found", "prefix found")):
        values = [getattr(f, name) for f in admitted]
        right.plot([f.queue for f in admitted], values, "o-", label=label)
    right.set_title("an admitted request, on top", fontsize=9)
    for axis in (left, right):
        axis.set_xscale("symlog", linthresh=10)
        axis.set_xlim(-1, 1.5 * max(10, *queues))  # by itself it would begin far below 0
        low, high = axis.get_ylim()
        axis.set_ylim(min(0, low), 1.1 * max(0, high))  # from 0, and nothing hidden
        axis.set_xlabel("sequences waiting", fontsize=8)
        axis.set_ylabel("microseconds", fontsize=8)
        axis.legend(frameon=False, fontsize=8)
    return figure


def main() -> None:
    """Measure, print, write JSON and a plot if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--queues", type=int, nargs="+", default=list(QUEUES))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the figures into this file (PNG)")
    args = parser.parse_args()
    head = begin("scheduler", args.json)
    console = Console(stderr=True)
    queues = track(args.queues, "Measuring", console=console, transient=True)
    figures = [measure(args.running, queue, args.steps) for queue in queues]
    record: dict[str, Any] = {
        **head,
        "arguments": {"running": args.running, "steps": args.steps},
        "figures_microseconds": [asdict(f) for f in figures],
    }
    Console().print(table(figures, args.running))
    write(record, args.json)
    if args.plot:
        commit_ = str(record["commit"] or "unknown")[:7]
        drawn = draw(figures, f"{args.running} running · {record['machine']} · {commit_}")
        drawn.savefig(args.plot, dpi=90)


if __name__ == "__main__":
    main()
