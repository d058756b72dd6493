"""What a measurement was made with: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections import Counter
from importlib import metadata
from pathlib import Path
from typing import Any

from mm_engine.plugins.discovery import installed

DISTRIBUTIONS = ("mm-engine", "mm-engine-kernels", "torch", "transformers")


def provenance() -> dict[str, Any]:
    """Where and when a record was made, and from what: the head that all records share."""
    return {
        "date": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def machine() -> str:
    """This machine in a line: graphics cards, processor, cores that may be used, memory."""
    cards = [f"{n} × {name}" if n > 1 else name for name, n in Counter(_cards()).items()]
    try:
        num_cores = len(os.sched_getaffinity(0))
    except AttributeError:  # macOS
        num_cores = os.cpu_count() or 1
    cores = f"{num_cores} core{'s' * (num_cores > 1)}"
    import psutil

    memory = f"{psutil.virtual_memory().total / 2**30:.0f} GiB"
    return ", ".join([*cards, _processor(), cores, memory])


def versions() -> dict[str, str]:
    """Versions by name: Python, what computes, every installed plugin."""
    found = {"python": platform.python_version()}
    names = [*DISTRIBUTIONS, *(record.distribution for record in installed())]
    for name in dict.fromkeys(names):
        found[name] = metadata.version(name)
    return found


def commit() -> str | None:
    """The commit of the checkout that this package runs from, or None if it is installed.

    `-dirty` at its end says that files differ from it.
    """
    file = Path(__file__)
    if _git("ls-files", "--error-unmatch", str(file)) is None:  # somebody else's repository
        return None
    head = _git("rev-parse", "HEAD")
    return f"{head}-dirty" if head and _git("status", "--porcelain", "-uno") else head


def _git(*arguments: str) -> str | None:
    """What git prints, or None if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cards() -> list[str]:
    """Names of NVIDIA's cards; asked of its tool, since torch would take memory on the first."""
    if shutil.which("nvidia-smi") is None:
        return []
    done = subprocess.run(
        ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
