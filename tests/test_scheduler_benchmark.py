"""benchmarks/scheduler.py runs, prints its table and writes its record; how fast isn't tested."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scheduler.py"


def test_a_small_run_makes_a_table_a_record_and_a_plot(tmp_path: Path) -> None:
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    flags = ["--running", "4", "--queues", "0", "3", "--steps", "20"]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *flags, "--json", str(out), "--plot", str(picture)],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "COLUMNS": "100"},
    )
    assert done.returncode == 0, done.stderr
    assert "4 running" in done.stdout and "admission" in done.stdout
    record = json.loads(out.read_text())
    assert {"machine", "versions", "commit", "date"} <= record.keys()
    empty, three = record["figures_microseconds"]
    assert (empty["queue"], empty["admission"], three["queue"]) == (0, None, 3)
    assert 0 < three["step_median"] <= three["step_p99"]
    assert picture.read_bytes().startswith(b"\x89PNG")
