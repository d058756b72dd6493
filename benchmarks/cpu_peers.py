"""This engine on a CPU beside transformers, vLLM and llama.cpp: one model, by turns.

    python benchmarks/cpu_peers.py [--vllm PATH] [--llama-cpp PATH] [--dtype float32] [--out X.json]
    python benchmarks/cpu_peers.py --quick       # to try the script itself, in a minute or two

PATH is the python of a venv of its own in which the peer is installed. Every engine runs in its own
process and answers the same prompts of token ids; in each round every one answers once, so that
what else the machine does falls on all alike. A figure is the median of the rounds. The machine's
own limits are measured before and after. What an engine has no figure for is told with the reason.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from checkpoint import make_checkpoint
from cpu_peer_parts.client import PeerError
from cpu_peer_parts.fleet import LLAMA_CPP, VLLM, Fleet, cores_of_this_process
from cpu_peer_parts.report import draw, markdown
from cpu_peer_parts.sections import SECTIONS, Bench, measure_floors
from cpu_peer_parts.sizes import full, quick
from record import begin, write

DTYPES = ("bfloat16", "float32")
START = time.monotonic()


def main() -> None:
    """Measure, print a Markdown table, write JSON and a plot if asked to."""
    args = arguments()
    sizes = (quick if args.quick else full)(args.dtype)
    head = begin("cpu_peers", args.out)
    say("making the checkpoint, if it isn't there")
    checkpoint = make_checkpoint(
        args.checkpoint,
        vision=sizes.scale.vision,
        text=sizes.scale.text,
        image_size=sizes.scale.image_size,
    )
    with tempfile.TemporaryDirectory(prefix="mm-engine-cpu-peers-") as folder:
        fleet = Fleet(
            checkpoint=checkpoint,
            folder=Path(args.logs or folder),
            sizes=sizes,
            dtype=args.dtype,
            threads=args.threads,
            limit=args.limit,
            pythons={k: v for k, v in ((VLLM, args.vllm), (LLAMA_CPP, args.llama_cpp)) if v},
            say=say,
        )
        record: dict[str, Any] = {
            **head,
            "quick": args.quick,
            "dtype": args.dtype,
            "threads": args.threads,
            "rounds": args.rounds or sizes.rounds,
            "seconds": args.seconds,
            "sizes": dataclasses.asdict(sizes),
            "sections": {},
        }
        try:
            run(args, fleet, record)
        finally:
            fleet.close_all()
    print(markdown(record))
    if args.plot:
        draw(record, args.plot)


def run(args: argparse.Namespace, fleet: Fleet, record: dict[str, Any]) -> None:
    """Measure what was asked for; the record is written after each section."""
    floors, told = measure_floors(fleet, args.floor_seconds)
    record["floors"] = {"rates": floors.to_json(), "before": told}
    bench = Bench(fleet, floors, record["rounds"], args.seconds, say)
    for name in [name for name in SECTIONS if name in args.sections]:
        bench.rows, bench.seconds = [], args.seconds
        start, error = time.monotonic(), None
        try:
            SECTIONS[name](bench)
        except Exception as raised:  # the others go on, and the record says why this one didn't
            error = f"{type(raised).__name__}: {raised}"
            say(f"{name}: {error}")
        record["sections"][name] = {
            "status": "error" if error else "ok",
            **({"error": error} if error else {}),
            "seconds": time.monotonic() - start,
            "rows": [row.to_json() for row in bench.rows],
        }
        record["engines"] = fleet.loaded
        write(record, args.out)
    # Twice, as a machine's limits move; all rows are held against those measured before.
    try:
        record["floors"]["after"] = measure_floors(fleet, args.floor_seconds)[1]
    except PeerError as failed:
        record["floors"]["after"] = {"error": str(failed)}
    write(record, args.out)


def say(line: str) -> None:
    """A line of progress, with the seconds since the start."""
    print(f"[{time.monotonic() - START:6.0f} s] {line}", file=sys.stderr, flush=True)


def arguments() -> argparse.Namespace:
    """What was asked for; ends the program with what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vllm", metavar="PATH", help="python of a venv with vLLM's CPU build")
    parser.add_argument(
        "--llama-cpp", metavar="PATH", help="python of a venv with llama-cpp-python and gguf"
    )
    parser.add_argument("--checkpoint", type=Path, help="where the model is made, if it isn't")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--threads", type=int, default=len(cores_of_this_process()))
    parser.add_argument("--rounds", type=int, help="at most, after one to warm up")
    parser.add_argument("--seconds", type=float, default=240.0, help="for a section, about")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds for one answer")
    parser.add_argument("--floor-seconds", type=float, help="for each of the machine's limits")
    parser.add_argument(
        "--sections", nargs="+", default=list(SECTIONS), choices=list(SECTIONS), metavar="SECTION"
    )
    parser.add_argument("--quick", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--out", type=Path, help="write the record to this file (JSON)")
    parser.add_argument("--plot", type=Path, help="draw the figures into this file (PNG)")
    parser.add_argument("--logs", type=Path, help="keep what the engines print in this folder")
    args = parser.parse_args()
    if args.threads < 1 or args.seconds <= 0 or (args.rounds or 1) < 1:
        parser.error("--threads, --seconds and --rounds must be above 0.")
    if args.checkpoint is None:
        args.checkpoint = Path(".cache/benchmark-quick" if args.quick else ".cache/benchmark-0.5b")
    if args.floor_seconds is None:
        args.floor_seconds = 0.2 if args.quick else 6.0
    if args.logs is not None:
        args.logs.mkdir(parents=True, exist_ok=True)
    return args


if __name__ == "__main__":
    main()
