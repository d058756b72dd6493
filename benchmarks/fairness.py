"""How long eight streams wait between two tokens while questions about new pictures arrive.

    python benchmarks/fairness.py [--json out.json]

One engine, three runs in each round, by turns: nothing arrives; a question about a new picture
arrives as soon as the last was answered, with `--max-decode-slowdown` as given; the same without a
limit. A first round warms up and isn't counted. The bound to keep: the 99th percentile of the
second is at most twice that of the first, over all rounds; the record has each round's too.

Times are the engine's: to map a picture, which a server does in its other process, counts in none.
A question that has no token yet when its run ends counts with its age then, so a median over such
is a lower bound.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from checkpoint import IMAGE_TOKEN, make_checkpoint
from mm_engine import LLM, SamplingParams
from mm_engine.config import SERVED_DECODE_SLOWDOWN
from mm_engine.request import PromptInputs
from record import begin, write

NUM_STREAMS = 8
NUM_TEXT = 40  # tokens of a question, beside its image
NUM_ANSWER = 8  # tokens of the answer to one
RUNS = ("alone", "paced", "unlimited")


@dataclass(slots=True)
class Run:
    """What one run brought, or several, in seconds."""

    gaps: list[float] = field(default_factory=list)  # between two steps that brought tokens
    ttfts: list[float] = field(default_factory=list)  # of the questions that arrived
    ages: list[float] = field(default_factory=list)  # of those without a token when a run ended

    @classmethod
    def all_of(cls, runs: list[Run]) -> Run:
        """Several runs as one."""
        whole = cls()
        for run in runs:
            whole.gaps += run.gaps
            whole.ttfts += run.ttfts
            whole.ages += run.ages
        return whole

    @property
    def p99(self) -> float:
        """The 99th percentile of the gaps."""
        return statistics.quantiles(self.gaps, n=100, method="inclusive")[98]


class Streams:
    """Eight answers that grow while questions arrive."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.rng = np.random.default_rng(0)
        self.number = 0

    def run(self, num_steps: int, *, arrivals: bool) -> Run:
        """Grow the streams by `num_steps` tokens each, or by fewer if steps bring them none."""
        run = Run()
        engine = self.llm.engine
        names = [self._add(max_tokens=num_steps + 64) for _ in range(NUM_STREAMS)]
        begun: set[str] = set()
        while len(begun) < NUM_STREAMS:
            begun.update(output.request_id for output in engine.step())
        last = time.perf_counter()
        question, asked, answered = "", 0.0, False
        for _ in range(num_steps):
            if arrivals and not question:
                before = time.perf_counter()
                question, answered = self._add(max_tokens=NUM_ANSWER, image=True), False
                asked = time.perf_counter()
                last += asked - before  # to map a picture isn't the engine's work
            outputs = engine.step()
            now = time.perf_counter()
            # All streams get a token in the same steps: one gap, seen by each of them.
            num_told = sum(output.request_id in names for output in outputs)
            assert num_told in (0, NUM_STREAMS), f"{num_told} of {NUM_STREAMS} got a token"
            if num_told:
                run.gaps.append(now - last)
                last = now
            for output in outputs:
                if output.request_id == question:
                    assert output.error is None, output.error
                    if not answered:
                        run.ttfts.append(now - asked)
                        answered = True
                    if output.finished:
                        question = ""
        if question and not answered:
            run.ages.append(time.perf_counter() - asked)
        for name in (*names, question):
            engine.abort(name, notify=False)
        while engine.has_work:
            engine.step()
        return run

    def _add(self, *, max_tokens: int, image: bool = False) -> str:
        self.number += 1
        ids = (1, *self.rng.integers(10, 210, NUM_TEXT).tolist())
        inputs = PromptInputs(prompt_token_ids=ids)
        if image:
            picture = Image.fromarray(self.rng.integers(0, 256, (336, 336, 3), dtype=np.uint8))
            ids = (1, IMAGE_TOKEN, *ids[1:])
            inputs = PromptInputs(prompt_token_ids=ids, multi_modal_data={"image": (picture,)})
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
        pipeline = self.llm.pipeline
        request = pipeline.request(pipeline.prepare(inputs), params, str(self.number))
        self.llm.engine.add(request)
        return request.request_id


def main() -> None:
    """Measure, print, write JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/benchmark-0.5b"))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--max-decode-slowdown", type=float, default=SERVED_DECODE_SLOWDOWN)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=150, help="tokens of each stream in a run")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    args = parser.parse_args()
    head = begin("fairness", args.json)
    llm = LLM(
        str(make_checkpoint(args.checkpoint)),
        dtype=args.dtype,
        kv_cache_memory=1 << 29,
        max_decode_slowdown=args.max_decode_slowdown,
    )
    rounds = measure(llm, args.rounds, args.steps)
    ratios = {name: [ratio(turn, name) for turn in rounds] for name in ("paced", "unlimited")}
    runs = {name: Run.all_of([turn[name] for turn in rounds]) for name in RUNS}
    record = {
        **head,
        "dtype": args.dtype,
        "rounds": args.rounds,
        "steps": args.steps,
        "max_decode_slowdown": args.max_decode_slowdown,
        "runs": {name: figures(run) for name, run in runs.items()},
        "p99_ratio": ratio(runs, "paced"),
        "p99_ratio_of_rounds": ratios["paced"],
        "p99_ratio_unlimited": ratio(runs, "unlimited"),
        "p99_ratio_unlimited_of_rounds": ratios["unlimited"],
    }
    show(record)
    write(record, args.json)


def measure(llm: LLM, num_rounds: int, num_steps: int) -> list[dict[str, Run]]:
    """The runs of each round by name, but for those of a first one that warms up.

    Which run comes first changes from round to round: what grows or heats up falls on all alike.
    """
    scheduler = llm.engine.scheduler
    streams, pace = Streams(llm), scheduler.pace
    rounds = []
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Measuring", total=len(RUNS) * (num_rounds + 1))
        for number in range(num_rounds + 1):
            first = number % len(RUNS)
            turn = {}
            for name in (*RUNS[first:], *RUNS[:first]):
                scheduler.pace = None if name == "unlimited" else pace
                turn[name] = streams.run(num_steps, arrivals=name != "alone")
                bar.advance(task)
            if number:
                rounds.append(turn)
    return rounds


def ratio(runs: dict[str, Run], name: str) -> float:
    """How many times as long the longest gaps of a run are as those without arrivals."""
    return runs[name].p99 / runs["alone"].p99


def figures(run: Run) -> dict[str, Any]:
    """A run in numbers; the median TTFT is a lower bound if questions are unanswered."""
    ttfts = [*run.ttfts, *run.ages]
    return {
        "median_itl_seconds": statistics.median(run.gaps),
        "p99_itl_seconds": run.p99,
        "max_itl_seconds": max(run.gaps),
        "num_gaps": len(run.gaps),
        "median_ttft_seconds": statistics.median(ttfts) if ttfts else None,
        "num_answered": len(run.ttfts),
        "num_unanswered": len(run.ages),
    }


def show(record: dict[str, Any]) -> None:
    """Print a table."""
    table = Table("", "median ITL", "p99 ITL", "longest", "TTFT of a picture", "answered")
    for name, run in record["runs"].items():
        times = [run[f"{what}_itl_seconds"] for what in ("median", "p99", "max")]
        table.add_row(
            name,
            *(f"{1000 * seconds:.1f} ms" for seconds in times),
            first_token(run),
            f"{run['num_answered']} of {run['num_answered'] + run['num_unanswered']}",
        )
    Console().print(table)
    print("p99 ITL beside arriving pictures, by that without them (in each round):")
    limits = (f"{record['max_decode_slowdown']:g}", ""), ("none", "_unlimited")
    for limit, suffix in limits:
        of_rounds = ", ".join(f"{value:.2f}" for value in record[f"p99_ratio{suffix}_of_rounds"])
        print(f"  limit {limit}: {record[f'p99_ratio{suffix}']:.2f} ({of_rounds})")


def first_token(run: dict[str, Any]) -> str:
    """The median TTFT of a run, for people."""
    if run["median_ttft_seconds"] is None:
        return ""
    return f"{'at least ' * bool(run['num_unanswered'])}{run['median_ttft_seconds']:.2f} s"


if __name__ == "__main__":
    main()
