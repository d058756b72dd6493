"""All that the README of this folder says about a GPU, in one go within ten minutes.

    python benchmarks/gpu.py [--json out.json]
    python benchmarks/gpu.py --device cpu --tiny     # to try the script itself, in a minute

The sections run one after another, some together in a process of their own, so that what one of
them breaks on the card costs those of its process alone. Each has a time limit. One that fails is
recorded with its reason, one for which no time is left as skipped, and the others go on. The
record is written after each process.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from gpu_sections.attention import attention, kernels
from gpu_sections.floors import floors, machine
from gpu_sections.measure import Section
from gpu_sections.model import decode, prefill, tower
from gpu_sections.run import Run, run_sections, skipped
from gpu_sections.shapes import FULL, TINY
from gpu_sections.tests import PATHS, TINY_PATHS, card_tests, end
from gpu_sections.throughput import throughput
from record import begin, write

RESULTS = Path(__file__).parent / "results"
SECONDS = 570.0
TESTS_LIMIT = 160.0
#: The sections of each process, in their order, with their limits in seconds. Starting a process
#: and loading the model are within the limits of its first.
GROUPS: tuple[dict[str, tuple[Callable[[Run, Section], None], float]], ...] = (
    {"machine": (machine, 20.0), "floors": (floors, 40.0)},
    {
        "decode": (decode, 120.0),
        "prefill": (prefill, 40.0),
        "tower": (tower, 20.0),
        "throughput": (throughput, 170.0),
    },
    {"attention": (attention, 90.0), "kernels": (kernels, 40.0)},
    {"tests": (card_tests(PATHS, TESTS_LIMIT), TESTS_LIMIT)},
)
NAMES = [name for group in GROUPS for name in group]
START = 60.0  # seconds that a process may take beside its sections' limits: imports, its end


def main() -> None:
    """Measure, print a table, write JSON."""
    args = arguments()
    path = args.json or (None if args.tiny else RESULTS / "gpu.json")
    deadline = time.time() + args.seconds
    head = begin("gpu", path)
    record: dict[str, Any] = {**head, "tiny": args.tiny, "device": args.device, "sections": {}}

    def tell() -> None:
        record["seconds"] = args.seconds - (deadline - time.time())
        write(record, path)

    with tempfile.TemporaryDirectory(prefix="mm-engine-gpu-") as folder:
        for group in GROUPS:
            names = [name for name in group if name in args.only]
            if not names:
                continue
            sections = record["sections"]
            if args.processes:
                sections |= in_a_process(names, args, sections, Path(folder), deadline)
            else:
                run_group(names, args, sections, Path(folder), deadline, tell)
            tell()
    Console(width=None if sys.stdout.isatty() else 140).print(table(record["sections"]))
    for name, section in record["sections"].items():
        if section["status"] != "ok":
            print(f"{name}: {section['status']}: {section['error']}")


def arguments() -> argparse.Namespace:
    """What was asked for; ends the program with what is wrong with it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="small shapes, to try the script")
    parser.add_argument("--json", type=Path, help="write here, not to results/gpu.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for the whole run")
    parser.add_argument("--only", nargs="+", default=NAMES, choices=NAMES, metavar="SECTION")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="paths for the section of tests")
    parser.add_argument(
        "--processes",
        action=argparse.BooleanOptionalAction,
        help="several sections in a process of their own; the default, but for --tiny",
    )
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.processes is None:
        args.processes = not args.tiny
    if args.device == "cpu" and not args.tiny:
        parser.error("a CPU takes hours for these shapes: add --tiny to try the script.")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA card: check the driver, or try --device cpu --tiny.")
    return args


def run_group(
    names: list[str],
    args: argparse.Namespace,
    sections: dict[str, Any],
    folder: Path,
    deadline: float,
    tell: Callable[[], None],
) -> None:
    """Run sections in this process; what comes of them goes to `sections`."""
    todo = {name: group[name] for group in GROUPS for name in names if name in group}
    paths = args.tests or (TINY_PATHS if args.tiny else PATHS)
    if "tests" in todo:
        todo["tests"] = (card_tests(paths, TESTS_LIMIT), TESTS_LIMIT)
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    run = Run(device, TINY if args.tiny else FULL, folder, sections)
    run_sections(todo, run, deadline, tell)


def in_a_process(
    names: list[str],
    args: argparse.Namespace,
    known: dict[str, Any],
    folder: Path,
    deadline: float,
) -> dict[str, Any]:
    """Run sections in a new process, and end it where it doesn't end by itself."""
    left = deadline - time.time()
    if left <= 0:
        return {name: skipped(left) for name in names}
    note = folder / f"{names[0]}.json"
    order = {"names": names, "known": known, "deadline": deadline}
    note.write_text(json.dumps(order), "utf-8")
    command = [sys.executable, __file__, "--child", str(note), "--device", args.device]
    command += ["--tiny"] if args.tiny else []
    command += ["--tests", *args.tests] if args.tests else []
    limits = {name: group[name][1] for group in GROUPS for name in names if name in group}
    most = min(sum(limits.values()) + START, left + START / 4)
    path = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        command,
        env={"HF_HUB_OFFLINE": "1", **os.environ, "PYTHONPATH": path},  # nothing is fetched
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # to end it with all that it has started
        text=True,
    )
    try:
        code = process.wait(most)
        why = f"the process of this section ended with exit status {code}"
    except subprocess.TimeoutExpired:
        why = f"the process of this section did not end within {most:.0f} s"
    finally:
        end(process)
        process.wait()
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError):
        found = json.loads(Path(f"{note}.out").read_text("utf-8"))
    lost = {"status": "error", "error": why, "rows": []}
    return {name: found.get(name, lost) for name in names}


def child(args: argparse.Namespace) -> None:
    """What the process of some sections does: it writes what it has after each of them."""
    order = json.loads(args.child.read_text("utf-8"))
    sections = dict(order["known"])
    out = Path(f"{args.child}.out")

    def tell() -> None:
        new = out.with_suffix(".new")
        new.write_text(json.dumps(sections), "utf-8")
        new.replace(out)  # whole, whenever this process ends

    run_group(order["names"], args, sections, args.child.parent / "model", order["deadline"], tell)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # whatever threads a section has left behind


def table(sections: dict[str, Any]) -> Table:
    """All lines for people."""
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("")
    for name in ("measured", "floor or peer", "ratio", "target"):
        shown.add_column(name, justify="right")
    shown.add_column("")
    for section in sections.values():
        for row in section["rows"]:
            shown.add_row(*cells(row))
    return shown


def cells(row: dict[str, Any]) -> list[str]:
    """A line's cells."""

    def figure(value: float | None) -> str:
        return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"

    ratio = "" if row["ratio"] is None else f"{row['ratio']:.2f} {row['ratio_of']}"
    target = ""
    if row["target"] is not None:
        target = f"{'≤' if row['at_most'] else '≥'} {row['target']:g}"
    verdict = {True: "met", False: "missed", None: "" if not target else "not known"}[row["met"]]
    measured = f"{figure(row['measured'])} {row['unit']}"
    return [row["name"], measured, figure(row["floor"]), ratio, target, verdict]


if __name__ == "__main__":
    arguments_ = arguments() if "--child" in sys.argv else None
    if arguments_ is None:
        main()
    else:
        child(arguments_)
