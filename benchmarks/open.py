"""Whether a server can stand in the open: what long use, too many clients and a killed engine do.

    python benchmarks/open.py soak [--requests 20000] [--json out.json]     # make soak

Each starts `engine serve` with the demo on a free port of 127.0.0.1, and asks it over HTTP. The
exit status is 1 if what has to be kept isn't.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

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
    console = Console()
    console.print(table)
    for name, criterion in figures["criteria"].items():
        mark = "kept  " if criterion["kept"] else "BROKEN"
        console.print(f"{mark} {name}: {criterion['criterion']}: {criterion['found']}")
    for complaint in figures["complaints"]:
        console.print(f"  {complaint}", markup=False)
    return {**figures, "kept": figures["flat"]}


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
    for question in questions.choices.values():
        question.add_argument("--json", type=Path, help="write the figures to this file")
        question.add_argument(
            "--server-flags", nargs=argparse.REMAINDER, default=[], help="more for engine serve"
        )
    args = parser.parse_args()
    head = begin(f"open {args.run.__name__.removeprefix('run_')}", args.json)
    loads = [os.getloadavg()]
    figures = args.run(args)
    loads.append(os.getloadavg())
    write({**head, "load_averages": loads, **figures}, args.json)
    return 0 if figures["kept"] else 1


if __name__ == "__main__":
    sys.exit(main())
