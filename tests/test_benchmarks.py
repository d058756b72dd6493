"""The scripts in benchmarks/ run to their end on a small model; how fast isn't tested."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_engine.cli.bench import machine

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
SCRIPTS = (
    "checkpoint",
    "compare",
    "fairness",
    "gpu",
    "quantization",
    "record",
    "reuse",
    "scheduler",
    "table",
)
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "projection_dim": 32,
}
TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A script as a module; they import each other by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    parts = [f"gpu_sections.{path.stem}" for path in (BENCHMARKS / "gpu_sections").glob("*.py")]
    for name in (*SCRIPTS, *parts):  # none of another test's, and none left behind
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    return importlib.import_module


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture
def record(
    script: Callable[[str], Any],
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Run a script's `main` on a small checkpoint; the record that it wrote."""

    def run(name: str, *flags: str) -> Any:
        module, out = script(name), tmp_path / "out.json"
        script("checkpoint").make_checkpoint(checkpoint, vision=VISION, text=TEXT)
        model = ("--checkpoint", str(checkpoint), "--dtype", "float32")
        monkeypatch.setattr(sys, "argv", [name, *model, *flags, "--json", str(out)])
        module.main()
        return json.loads(out.read_text("utf-8"))

    return run


def test_fairness(record: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    written = record("fairness", "--rounds", "2", "--steps", "6")
    assert written["benchmark"] == "fairness" and written["dtype"] == "float32"
    alone, paced, unlimited = (written["runs"][n] for n in ("alone", "paced", "unlimited"))
    assert alone["num_gaps"] == unlimited["num_gaps"] == 2 * 6  # one a step, without the warm-up
    assert alone["num_answered"] == alone["num_unanswered"] == 0
    assert alone["median_ttft_seconds"] is None
    assert paced["num_answered"] + paced["num_unanswered"] >= 2
    assert unlimited["num_answered"] >= 2  # a prompt is read in one step
    for run in (alone, paced, unlimited):
        assert 0 < run["median_itl_seconds"] <= run["p99_itl_seconds"] <= run["max_itl_seconds"]
    assert len(written["p99_ratio_of_rounds"]) == len(written["p99_ratio_unlimited_of_rounds"]) == 2
    assert "limit none: " in capsys.readouterr().out


def test_runs_of_fairness_take_turns_in_coming_first(
    script: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    fairness = script("fairness")
    pace, calls = object(), []

    class Engine:
        class scheduler:
            pace: object = None

    class LLM:
        engine = Engine

    class Streams:
        def __init__(self, llm: object) -> None: ...

        def run(self, num_steps: int, *, arrivals: bool) -> Any:
            calls.append((arrivals, Engine.scheduler.pace is pace))
            return fairness.Run(gaps=[float(len(calls))])

    Engine.scheduler.pace = pace
    monkeypatch.setattr(fairness, "Streams", Streams)
    rounds = fairness.measure(LLM, 3, 9)
    alone, paced, unlimited = (False, True), (True, True), (True, False)
    warm_up, *counted = (calls[i : i + 3] for i in range(0, 12, 3))
    assert warm_up == [alone, paced, unlimited]
    assert counted == [[paced, unlimited, alone], [unlimited, alone, paced], warm_up]
    assert [turn["alone"].gaps for turn in rounds] == [[6.0], [8.0], [10.0]]
    assert [turn["paced"].gaps for turn in rounds] == [[4.0], [9.0], [11.0]]


def test_a_picture_that_waits_when_fairness_ends_counts_as_at_least_so_late(
    script: Callable[[str], Any],
) -> None:
    fairness = script("fairness")
    runs = [fairness.Run([0.1, 0.2], [2.0, 3.0], [9.0]), fairness.Run([0.3, 0.4], [4.0], [])]
    told = fairness.figures(fairness.Run.all_of(runs))
    assert told["num_answered"] == 3 and told["num_unanswered"] == 1
    assert told["median_ttft_seconds"] == 3.5
    assert fairness.first_token(told) == "at least 3.50 s"
    told = fairness.figures(runs[1])
    assert fairness.first_token(told) == "4.00 s"


def test_reuse(record: Callable[..., Any]) -> None:
    written = record("reuse", "--rounds", "1")
    assert written["benchmark"] == "reuse" and written["dtype"] == "float32"
    assert written["cached_tokens"] == 576
    assert written["first_question_seconds"] > 0 and written["second_question_seconds"] > 0


def test_quantization(
    script: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the demo, with the errors that docs/howto/quantize.md states, and something to spare."""
    module, out = script("quantization"), tmp_path / "out.json"
    flags = ("--questions", "12", "--dtype", "float32", "--json", str(out))
    monkeypatch.setattr(sys, "argv", ["quantization", *flags])
    module.main()
    written = json.loads(out.read_text("utf-8"))
    assert written["questions"] == 12 and written["answer_tokens"] >= 24
    assert written["compared_tokens"] == 12 * module.NUM_COMPARED
    told = written["variants"]
    assert told.keys() == {"none", *module.VARIANTS}
    limits = {"none": 0.0, "fp8": 0.13, "int8": 0.03, "int4": 0.2, "fp8 cache": 0.1}
    for name, limit in limits.items():
        assert limit / 4 <= told[name]["rms_logit_error"] <= limit, name
        assert told[name]["max_logit_error"] <= 20 * limit, name
        assert told[name]["greedy_agreement"] >= 0.98, name
        assert told[name]["greedy_agreement_past_the_end"] >= 0.88, name
        assert told[name]["same_answers"] >= 0.9 and told[name]["accuracy"] >= 0.9, name
    sizes = {name: figures["weight_bytes"] for name, figures in told.items()}
    assert sizes["none"] == sizes["fp8 cache"] > 3.5 * sizes["int8"]  # float32 to 8 bits
    assert sizes["int4"] == sizes["int4, fp8 cache"]


def test_compare(
    script: Callable[[str], Any], record: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script("compare"), "NUM_DECODED", 3)
    written = record("compare", "--rounds", "1")
    assert written["dtype"] == "float32"
    assert len(written["rows"]) == 5
    table = script("table")
    assert table.is_comparison(written)
    assert ", float32; medians of 1 rounds" in table.comparison(written)


@pytest.mark.parametrize(
    ("commit", "warns"), [("12ab", False), ("12ab-dirty", True), (None, False)]
)
def test_a_record_of_changed_files_is_warned_of(
    script: Callable[[str], Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    commit: str | None,
    warns: bool,
) -> None:
    begin = script("record").begin
    monkeypatch.setattr(machine, "commit", lambda: commit)
    assert begin("x", Path("out.json"))["commit"] == commit
    told = capsys.readouterr().err
    assert told.startswith("warning: files differ from the commit, and out.json") == warns
    assert bool(told) == warns
    begin("x", None)  # nothing is kept
    assert capsys.readouterr().err == ""
