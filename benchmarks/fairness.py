"""How long eight streams wait between two tokens while questions about new pictures arrive.

    python benchmarks/fairness.py [--json out.json]

One engine, three runs of each round: nothing arrives; a question about a new picture arrives as
soon as the last was answered, with `--max-decode-slowdown` as given; the same without a limit. The
bound to keep: the 99th percentile of the second is at most twice that of the first.
"""

from __future__ import annotations

import argparse
import json
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
from mm_engine.cli.bench.machine import provenance
from mm_engine.config import SERVED_DECODE_SLOWDOWN
from mm_engine.request import PromptInputs

NUM_STREAMS = 8
NUM_TEXT = 40  # tokens of a question, beside its image
NUM_ANSWER = 8  # tokens of the answer to one


@dataclass(slots=True)
class Run:
    """What one run brought, in seconds."""

    gaps: list[float] = field(default_factory=list)  # between two tokens of each stream
    ttfts: list[float] = field(default_factory=list)  # of the questions that arrived

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

    def run(self, num_steps: int, *, arrivals: bool, run: Run) -> None:
        """Grow the streams by `num_steps` tokens each."""
        engine = self.llm.engine
        names = [self._add(max_tokens=num_steps + 64) for _ in range(NUM_STREAMS)]
        begun: set[str] = set()
        while len(begun) < NUM_STREAMS:
            begun.update(output.request_id for output in engine.step())
        last = time.perf_counter()
        question, asked = "", 0.0
        for _ in range(num_steps):
            if arrivals and not question:
                question, asked = self._add(max_tokens=NUM_ANSWER, image=True), last
                answered = False
            outputs = engine.step()
            now = time.perf_counter()
            run.gaps += [now - last] * sum(output.request_id in names for output in outputs)
            last = now
            for output in outputs:
                if output.request_id == question:
                    assert output.error is None, output.error
                    if not answered:
                        run.ttfts.append(now - asked)
                        answered = True
                    if output.finished:
                        question = ""
        for name in (*names, question):
            engine.abort(name, notify=False)
        while engine.has_work:
            engine.step()

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
    llm = LLM(
        str(make_checkpoint(args.checkpoint)),
        dtype=args.dtype,
        kv_cache_memory=1 << 29,
        max_decode_slowdown=args.max_decode_slowdown,
    )
    scheduler = llm.engine.scheduler
    streams, pace = Streams(llm), scheduler.pace
    runs = {"alone": Run(), "paced": Run(), "unlimited": Run()}
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("Measuring", total=3 * args.rounds)
        for _ in range(args.rounds):
            for name, run in runs.items():
                scheduler.pace = None if name == "unlimited" else pace
                streams.run(args.steps, arrivals=name != "alone", run=run)
                bar.advance(task)
    record = {
        "benchmark": "fairness",
        **provenance(),
        "dtype": args.dtype,
        "rounds": args.rounds,
        "steps": args.steps,
        "max_decode_slowdown": args.max_decode_slowdown,
        "runs": {name: figures(run) for name, run in runs.items()},
        "p99_ratio": runs["paced"].p99 / runs["alone"].p99,
        "p99_ratio_unlimited": runs["unlimited"].p99 / runs["alone"].p99,
    }
    show(record)
    if args.json:
        args.json.write_text(json.dumps(record, indent=2) + "\n")


def figures(run: Run) -> dict[str, Any]:
    """A run in numbers."""
    return {
        "median_itl_seconds": statistics.median(run.gaps),
        "p99_itl_seconds": run.p99,
        "max_itl_seconds": max(run.gaps),
        "median_ttft_seconds": statistics.median(run.ttfts) if run.ttfts else None,
        "num_answered": len(run.ttfts),
    }


def show(record: dict[str, Any]) -> None:
    """Print a table."""
    table = Table("", "median ITL", "p99 ITL", "longest", "TTFT of a picture", "pictures")
    for name, run in record["runs"].items():
        times = [run[f"{what}_itl_seconds"] for what in ("median", "p99", "max")]
        table.add_row(
            name,
            *(f"{1000 * seconds:.1f} ms" for seconds in times),
            f"{run['median_ttft_seconds']:.2f} s" if run["num_answered"] else "",
            str(run["num_answered"]),
        )
    Console().print(table)
    limit = record["max_decode_slowdown"]
    print(f"p99 ITL beside arriving pictures: {record['p99_ratio']:.2f} times that without them,")
    print(
        f"with the limit of {limit:g}; {record['p99_ratio_unlimited']:.2f} times without a limit."
    )


if __name__ == "__main__":
    main()
