"""benchmarks/scheduler.py runs, prints its table and writes its record; how fast isn't tested."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "scheduler.py"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, as a module; it imports its neighbours by their bare names."""
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("scheduler_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


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
    assert three["admission"] > 0 and three["admission_found"] > 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_an_admission_is_measured_whole(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of the prompt are looked up in the step that admits it, not in that before it.

    They are hashed for that, which costs most where they are found. So a clock that counts the
    sequences that were looked up tells where the cost was put.
    """
    load = script.Load(4, 40)
    for _ in range(3):
        load.scheduler.add(load.new())
    load.step()  # the first of the queue
    looked_up = load.scheduler.kv_cache.lookup
    hashed: set[str] = set()

    def lookup(sequence: object) -> object:
        hashed.add(sequence.request.request_id)  # type: ignore[attr-defined]
        return looked_up(sequence)

    monkeypatch.setattr(load.scheduler.kv_cache, "lookup", lookup)
    monkeypatch.setattr(script.time, "thread_time", lambda: float(len(hashed)))
    load.step()
    for image in (None, "shared"):
        load.add_in_front(first := load.new("shared"))
        load.scheduler.finish(load.scheduler.running[0])
        load.step()
        assert first in load.scheduler.running
        assert load.admission(3, image) == 1e6  # one sequence, in the clock's microseconds


@pytest.mark.parametrize("found", [300.0, -40.0])
def test_the_plot_shows_every_figure(script: ModuleType, found: float) -> None:
    figures = [script.Figures(0, 60.0, 90.0, None, None)]
    figures += [script.Figures(queue, 61.0, 91.0, 400.0, found) for queue in (3, 1000)]
    left, right = script.draw(figures, "title").axes
    drawn = {
        line.get_label(): (axis, list(line.get_xdata()), list(line.get_ydata()))
        for axis in (left, right)
        for line in axis.get_lines()
    }
    assert drawn["median"] == (left, [0, 3, 1000], [60.0, 61.0, 61.0])
    assert drawn["p99"] == (left, [0, 3, 1000], [90.0, 91.0, 91.0])
    assert drawn["nothing found"] == (right, [3, 1000], [400.0, 400.0])
    assert drawn["prefix found"] == (right, [3, 1000], [found, found])
    for axis, x, y in drawn.values():
        begin, end = axis.get_xlim()
        bottom, top = axis.get_ylim()
        assert -10 <= begin <= min(x) and max(x) <= end
        assert min(0, *y) >= bottom and max(y) <= top
