"""Whether a server can stand in the open: what long use, crowds, a killed engine and leaving do.

    python benchmarks/open.py soak [--requests 20000] [--json out.json]     # make soak
    python benchmarks/open.py overload [--json out.json]
    python benchmarks/open.py kill9 [--streams 32] [--rounds 3] [--json out.json]
    python benchmarks/open.py http-cost [--rounds 9] [--json out.json]
    python benchmarks/open.py leave [--rounds 20] [--json out.json]

Each starts `engine serve` with the demo on a free port of 127.0.0.1, and asks it over HTTP. The
exit status is 1 if what has to be kept isn't.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from mm_engine.cli.bench.workload import Shape
from open_parts.http_cost import http_cost
from open_parts.kill9 import kill9
from open_parts.leave import PHASES, leave
from open_parts.overload import Load, overload
from open_parts.soak import MIB, soak
from record import begin, write


@contextmanager
def progress(what: str, total: float) -> Iterator[Callable[[float], None]]:
    """A bar on stderr; yields what advances it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda num: bar.advance(task, num)


def run_soak(args: argparse.Namespace) -> dict[str, Any]:
    """Thousands of mixed requests: is what the server holds flat, are its answers the same?"""
    with progress("Soaking", args.requests) as tick:
        figures = soak(
            args.requests,
            concurrency=args.concurrency,
            every=args.every,
            seed=args.seed,
            max_growth=args.max_growth,
            flags=tuple(args.server_flags),
            tick=tick,
        )
    table = Table("requests", "seconds", "RSS MiB", "fds", "threads", "kept blocks", "encoder rows")
    for checkpoint in figures["checkpoints"]:
        held = checkpoint["processes"].values()
        table.add_row(
            f"{checkpoint['num_requests']:,}",
            f"{checkpoint['seconds']:.0f}",
            " ".join(f"{one['rss'] / MIB:.0f}" for one in held),
            " ".join(str(one["num_fds"]) for one in held),
            " ".join(str(one["num_threads"]) for one in held),
            f"{checkpoint['gauges']['num_kept_blocks']:.0f}",
            f"{checkpoint['gauges']['encoder_rows']:.0f}",
        )
    Console().print(table)
    show(figures["criteria"])
    for complaint in figures["complaints"]:
        Console().print(f"  {complaint}", markup=False)
    return {**figures, "kept": figures["flat"]}


def run_overload(args: argparse.Namespace) -> dict[str, Any]:
    """Ten times what a server sustains: who is answered, how soon, and is it well meanwhile?

    Three times: with the default bounds of the queue, which are asked for what has to be kept, and
    with a queue of four times as many places, bounded by time and not.
    """
    shape = Shape(input_len=args.input_len, output_len=args.output_len)
    load = Load(shape, args.concurrency, args.closed_seconds, args.seconds, args.factor)
    runs: dict[str, dict[str, Any]] = {}
    with progress("Overloading", 2 * 3) as tick:

        def measure(name: str, *flags: str) -> None:
            runs[name] = overload(load, (*args.server_flags, *flags), lambda: tick(1))

        measure("default")
        limit = args.queue_seconds or runs["default"]["closed_loop"]["ttft_seconds"]["p99"]
        queue = ("--max-queued-requests", str(4 * args.concurrency))
        measure("long, by time", *queue, "--max-queue-seconds", f"{max(0.05, limit):.2f}")
        measure("long", *queue)
    table = Table("queue", "1×", "p99 TTFT", "offered", "taken", "p99 TTFT", "/health p99", "MiB")
    for name, run in runs.items():
        base, loaded = run["closed_loop"], run["open_loop"]
        table.add_row(
            name,
            f"{base['admitted_per_second']:.0f}/s",
            f"{base['ttft_seconds']['p99']:.2f} s",
            f"{loaded['offered_per_second']:.0f}/s",
            f"{loaded['admitted_per_second']:.0f}/s",
            f"{loaded['ttft_seconds']['p99']:.2f} s",
            f"{1000 * loaded['health_seconds']['p99']:.0f} ms",
            f"{run['criteria']['memory']['found']:+.0f}",
        )
    Console().print(table)
    show(runs["default"]["criteria"])
    kept = all(criterion["kept"] for criterion in runs["default"]["criteria"].values())
    return {"load": asdict(load), "runs": runs, "kept": kept}


def show(criteria: dict[str, Any]) -> None:
    """Print what was held to what."""
    for name, criterion in criteria.items():
        mark = "kept  " if criterion["kept"] else "BROKEN"
        Console().print(f"{mark} {name}: {criterion['criterion']}: {criterion['found']}")


def run_kill9(args: argparse.Namespace) -> dict[str, Any]:
    """The engine process is killed under load: who is told, and how soon is there another?"""
    with progress("Killing", args.rounds) as tick:
        rounds = []
        for _ in range(args.rounds):
            rounds.append(kill9(args.streams, tuple(args.server_flags)))
            tick(1)
    table = Table("round", "told, last", "cold start", "serving again", "left", "answer", "kept")
    for number, one in enumerate(rounds):
        table.add_row(
            str(number + 1),
            f"{one['num_told']} of {one['num_streams']}, {max(one['told_seconds']):.2f} s",
            f"{one['cold_start_seconds']:.2f} s",
            f"{one['serving_again_seconds']:.2f} s",
            str(max(0, one["num_left_behind"]) + len(one["left_at_end"])),
            "the same" if one["same_answer"] else "ANOTHER",
            "yes" if one["kept"] else "NO",
        )
    Console().print(table)
    return {"rounds": rounds, "kept": all(one["kept"] for one in rounds)}


def run_http_cost(args: argparse.Namespace) -> dict[str, Any]:
    """64 streams over HTTP beside `LLM.generate`: what is left of the engine's throughput?"""
    shape = Shape(input_len=args.input_len, output_len=args.output_len)
    with progress("Measuring", 2 * (1 + args.rounds)) as tick:
        figures = http_cost(
            shape,
            num_streams=args.streams,
            num_prompts=args.prompts,
            num_rounds=args.rounds,
            flags=tuple(args.server_flags),
            tick=lambda: tick(1),
        )
    table = Table("", "tokens/s in each round", "cores taken")
    for name in ("offline", "http"):
        rates, last = figures["output_tokens_per_second"][name], figures[name][-1]["cores_taken"]
        table.add_row(
            name,
            ", ".join(f"{rate:,.0f}" for rate in rates),
            " · ".join(f"{who} {cores:.2f}" for who, cores in last.items()),
        )
    Console().print(table)
    pairs = ", ".join(f"{ratio:.2f}" for ratio in figures["ratios"])
    print(f"HTTP / offline: {figures['ratio']:.2f}, the median of {pairs}")
    return figures


def run_leave(args: argparse.Namespace) -> dict[str, Any]:
    """Clients leave in each phase of a request: how soon is nothing held for them?"""
    with progress("Leaving", len(args.phases) * args.rounds) as tick:
        figures = leave(args.phases, args.rounds, tuple(args.server_flags), lambda: tick(1))
    table = Table("phase", "rounds", "median", "p99", "most")
    for name, phase in figures["phases"].items():
        seconds = (f"{1000 * phase['seconds'][key]:.0f} ms" for key in ("median", "p99", "max"))
        table.add_row(name, str(phase["num_rounds"]), *seconds)
    Console().print(table)
    show(figures["criteria"])
    return figures


def main() -> int:
    """Measure, print, write JSON if asked to; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    questions = parser.add_subparsers(required=True, metavar="QUESTION")
    soaking = questions.add_parser("soak", help=run_soak.__doc__)
    soaking.set_defaults(run=run_soak)
    soaking.add_argument("--requests", type=int, default=20_000)
    soaking.add_argument("--concurrency", type=int, default=24)
    soaking.add_argument("--every", type=int, default=500, help="requests between two checkpoints")
    soaking.add_argument("--seed", type=int, default=0)
    soaking.add_argument(
        "--max-growth", type=float, default=2.0, help="of a process, MiB in 1,000 requests"
    )
    loading = questions.add_parser("overload", help=run_overload.__doc__.splitlines()[0])
    loading.set_defaults(run=run_overload)
    loading.add_argument("--factor", type=float, default=10.0, help="of what is sustained")
    loading.add_argument("--seconds", type=float, default=60.0, help="of the overload")
    loading.add_argument("--closed-seconds", type=float, default=20.0, help="to find what is")
    loading.add_argument("--concurrency", type=int, default=64, help="the engine's --max-num-seqs")
    loading.add_argument("--input-len", type=int, default=32, help="tokens")
    loading.add_argument("--output-len", type=int, default=256, help="tokens")
    loading.add_argument(
        "--queue-seconds", type=float, help="default: p99 TTFT of the first closed loop"
    )
    killing = questions.add_parser("kill9", help=run_kill9.__doc__)
    killing.set_defaults(run=run_kill9)
    killing.add_argument("--streams", type=int, default=32)
    killing.add_argument("--rounds", type=int, default=3)
    costing = questions.add_parser("http-cost", help=run_http_cost.__doc__)
    costing.set_defaults(run=run_http_cost)
    costing.add_argument("--streams", type=int, default=64)
    costing.add_argument("--prompts", type=int, default=512, help="in each round")
    costing.add_argument("--rounds", type=int, default=9)
    costing.add_argument("--input-len", type=int, default=32, help="tokens")
    costing.add_argument("--output-len", type=int, default=256, help="tokens")
    leaving = questions.add_parser("leave", help=run_leave.__doc__)
    leaving.set_defaults(run=run_leave)
    leaving.add_argument("--rounds", type=int, default=20, help="in each phase")
    leaving.add_argument("--phases", nargs="+", choices=PHASES, default=list(PHASES))
    for question in questions.choices.values():
        question.add_argument("--json", type=Path, help="write the figures to this file")
        question.add_argument(
            "--server-flags", nargs=argparse.REMAINDER, default=[], help="more for engine serve"
        )
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # the server ends, too
    head = begin(f"open {args.run.__name__.removeprefix('run_')}", args.json)
    loads = [os.getloadavg()]
    figures = args.run(args)
    loads.append(os.getloadavg())
    write({**head, "load_averages": loads, **figures}, args.json)
    return 0 if figures["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
