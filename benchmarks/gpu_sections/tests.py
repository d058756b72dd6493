"""The tests that take the card where there is one."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from gpu_sections.measure import Section
from gpu_sections.run import Run

ROOT = Path(__file__).parents[2]
PATHS = ("tests/kernels", "tests/attention", "tests/test_parity_backends.py")
TINY_PATHS = ("tests/kernels/test_ops.py",)
NUM_PROCESSES = 8
SPARE = 5.0  # seconds before the section's own limit


def card_tests(paths: Sequence[str], limit: float) -> Callable[[Run, Section], None]:
    """A section that runs pytest on `paths` for at most `limit` seconds."""

    def tests(run: Run, out: Section) -> None:
        """pytest in a process of its own; its last line is kept, and it fails as the section."""
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths]
        if run.device.type == "cuda" and importlib.util.find_spec("xdist") is not None:
            num = min(NUM_PROCESSES, os.cpu_count() or 1)
            command += ["--numprocesses", str(num), "--dist", "loadfile"]
        start = time.perf_counter()
        code, printed = finished(command, limit - SPARE)
        lines = [line for line in printed.splitlines() if line.strip()]
        last = lines[-1].strip() if lines else "nothing was printed"
        out.details |= {
            "paths": list(paths),
            "exit_status": code,
            "last_line": last,
            "failed": [line for line in lines if line.startswith(("FAILED", "ERROR"))][:50],
            "seconds": time.perf_counter() - start,
        }
        if code is None:
            raise RuntimeError(f"pytest took more than {limit - SPARE:.0f} s; last: {last}")
        if code != 0:
            raise RuntimeError(f"exit status {code}: {last}")

    return tests


def finished(command: Sequence[str], limit: float) -> tuple[int | None, str]:
    """Exit status and output of a command; None for one that was ended after `limit` seconds."""
    environment = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # to end it with all that it has started
    )
    try:
        return_code: int | None = None
        printed, _ = process.communicate(timeout=max(0.1, limit))
        return_code = process.returncode
    except subprocess.TimeoutExpired:
        end(process)
        printed, _ = process.communicate()
    except BaseException:
        end(process)
        process.communicate()
        raise
    return return_code, printed


def end(process: subprocess.Popen[str]) -> None:
    """Kill a process that has a session of its own, and its children."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()
