"""benchmarks/gpu.py runs to its end without a card, and its limits and formulas hold."""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mm_engine.attention.triton_paged import triton_fault
from pretend_cuda import pretending

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The scripts import each other by their bare names, and none is left behind."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run the script on the CPU with these flags; the record that it wrote."""

    def run(*flags: str) -> Any:
        out = tmp_path / "out.json"
        always = ("--device", "cpu", "--tiny", "--json", str(out))
        monkeypatch.setattr(sys, "argv", ["gpu", *always, *flags])
        importlib.import_module("gpu").main()
        return json.loads(out.read_text("utf-8"))

    return run


def test_all_sections_run_without_a_card(
    gpu: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried = tmp_path / "test_nothing.py"
    tried.write_text("def test_nothing():\n    pass\n")
    record = gpu("--tests", str(tried))
    sections = record["sections"]
    assert list(sections) == importlib.import_module("gpu").NAMES
    for name, section in sections.items():
        assert section["status"] == "ok", (name, section)
        assert "failed" not in section["details"] or not section["details"]["failed"]
    rows = [row for section in sections.values() for row in section["rows"]]
    assert all(row["measured"] >= 0 for row in rows)
    targets = [row["target"] for row in rows if row["target"] is not None]
    assert {0.85, 0.6, 0.5, 0.05, 4.0, 1.5, 1.15} == set(targets)
    for row in rows:
        if row["target"] is not None and "attention" not in row["name"]:  # no flash-attn here
            met = row["ratio"] <= row["target"] if row["at_most"] else row["ratio"] >= row["target"]
            assert row["met"] == met, row
    throughput = sections["throughput"]["details"]
    assert throughput["same_first"] == len(throughput["outputs"])  # the same weights, in float32
    if not torch.cuda.is_available():  # else Triton has no interpreter here, and wants the card
        assert any(row["name"].endswith("GQA: triton") for row in sections["attention"]["rows"])
        assert any(row["name"].endswith(": triton") for row in sections["kernels"]["rows"])
    assert sections["tests"]["details"]["last_line"].startswith("1 passed")
    printed = capsys.readouterr().out
    assert "decode, batch 3" in printed and "missed" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
@pytest.mark.skipif(triton_fault("cpu") is not None, reason="needs Triton and its interpreter")
def test_what_times_kernels_runs_on_a_card_that_is_pretended(gpu: Callable[..., Any]) -> None:
    names = ("floors", "attention", "kernels")  # an engine's profile takes the interpreter minutes
    with pretending() as card:
        record = gpu("--device", "cuda", "--no-processes", "--only", *names)
    for name in names:
        assert record["sections"][name]["status"] == "ok", record["sections"][name]
    assert card.num_kernels
    rows = {row["name"] for name in names for row in record["sections"][name]["rows"]}
    assert {"attention, decode 1 × 20, GQA: triton", "silu_mul 8 × 48: triton"} <= rows


def test_a_section_that_fails_or_takes_too_long_costs_no_other(tmp_path: Path) -> None:
    run_module = importlib.import_module("gpu_sections.run")
    measure = importlib.import_module("gpu_sections.measure")
    shapes = importlib.import_module("gpu_sections.shapes")
    row = measure.Row("a", 1.0, "ms")

    def fails(run: Any, out: Any) -> None:
        out.rows.append(row)
        raise ValueError("first line\nsecond line")

    def sleeps(run: Any, out: Any) -> None:
        time.sleep(60)

    def works(run: Any, out: Any) -> None:
        out.rows.append(row)

    told: list[int] = []
    run = run_module.Run(CPU, shapes.TINY, tmp_path, {})
    todo = {
        "fails": (fails, 60.0),
        "sleeps": (sleeps, 0.1),
        "works": (works, 60.0),
        "has no time": (works, 1000.0),
    }
    start = time.time()
    run_module.run_sections(todo, run, start + 100, lambda: told.append(len(run.sections)))
    assert time.time() - start < 30
    assert told == [1, 2, 3, 4]
    sections = run.sections
    assert [sections[name]["status"] for name in todo] == ["error", "error", "ok", "skipped"]
    assert sections["fails"]["error"] == "ValueError: first line"
    assert [len(sections[name]["rows"]) for name in todo] == [1, 0, 1, 0]
    assert "more than the 0 s" in sections["sleeps"]["error"]


def test_a_process_that_dies_costs_its_own_sections(
    gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The processes don't get to their imports, which take long: one answers, the other dies."""
    (tmp_path / "sitecustomize.py").write_text(
        "import json, os, sys\n"
        "if '--child' in sys.argv:\n"
        "    note = sys.argv[sys.argv.index('--child') + 1]\n"
        "    order = json.load(open(note))\n"
        "    if 'decode' in order['names']:\n"
        "        os.kill(os.getpid(), 9)\n"
        "    told = {'status': 'ok', 'rows': [], 'details': {'argv': sys.argv, 'order': order}}\n"
        "    with open(note + '.out', 'w') as file:\n"
        "        json.dump({'machine': told}, file)\n"
        "    os._exit(0)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    flags = ("--only", "machine", "floors", "decode", "--tests", "some/path")
    sections = gpu("--processes", *flags)["sections"]
    assert sections["machine"]["status"] == "ok"
    assert "exit status 0" in sections["floors"]["error"]  # it said nothing of it
    assert sections["decode"]["status"] == "error"
    assert "exit status -9" in sections["decode"]["error"]
    told = sections["machine"]["details"]
    assert told["order"]["names"] == ["machine", "floors"]
    monkeypatch.setattr(sys, "argv", told["argv"])
    args = importlib.import_module("gpu").arguments()
    assert (args.device, args.tiny, args.tests) == ("cpu", True, ["some/path"])


def test_a_process_is_told_what_was_measured_before(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpu = importlib.import_module("gpu")
    known = {"floors": {"status": "ok", "rows": [], "details": {"copy_bytes_per_second": 7.0}}}
    note = tmp_path / "machine.json"
    order = {"names": ["machine"], "known": known, "deadline": time.time() + 60}
    note.write_text(json.dumps(order))
    monkeypatch.setattr(sys, "argv", ["gpu", "--device", "cpu", "--tiny", "--child", str(note)])
    ended: list[int] = []
    monkeypatch.setattr(gpu.os, "_exit", ended.append)
    gpu.child(gpu.arguments())
    written = json.loads((tmp_path / "machine.json.out").read_text())
    assert ended == [0]
    assert written["floors"] == known["floors"] and written["machine"]["status"] == "ok"


def test_a_run_that_has_no_time_left_skips(gpu: Callable[..., Any]) -> None:
    sections = gpu("--seconds", "-1")["sections"]
    assert {section["status"] for section in sections.values()} == {"skipped"}


@pytest.mark.parametrize(
    ("flags", "says"), [(("--device", "cpu"), "add --tiny"), ((), "no CUDA card")]
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_what_cannot_be_measured_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    says: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *flags])
    with pytest.raises(SystemExit):
        importlib.import_module("gpu").main()
    assert says in capsys.readouterr().err


def test_formulas_are_what_transformers_model_computes_and_holds(
    tmp_path: Path, reference_kernels: None
) -> None:
    """FLOPs as PyTorch counts them, which takes all scores of causal attention for computed.

    It counts the attention that is made of products, and not the CPU's own kernel.
    """
    shapes = importlib.import_module("gpu_sections.shapes")
    run_module = importlib.import_module("gpu_sections.run")
    scale = shapes.TINY
    run = run_module.Run(CPU, scale, tmp_path, {})
    model = importlib.import_module("gpu_sections.throughput").peer(run)
    numbers = sum(p.numel() for p in model.model.language_model.parameters())
    numbers += model.lm_head.weight.numel() - model.model.language_model.embed_tokens.weight.numel()
    kv = scale.text["num_hidden_layers"] * 2 * scale.text["num_key_value_heads"] * scale.head_size
    assert shapes.decode_bytes(scale, [5, 7]) == 4 * (numbers + 12 * kv)

    def counted(call: Callable[[], object]) -> int:
        math = sdpa_kernel(SDPBackend.MATH)
        with FlopCounterMode(display=False) as counter, torch.no_grad(), math:
            call()
        return int(counter.get_total_flops())

    length = 9
    ids = torch.ones(1, length, dtype=torch.long)
    got = counted(lambda: model(input_ids=ids, logits_to_keep=1))
    heads, size = scale.text["num_attention_heads"], scale.head_size
    causal = shapes.attention_flops(heads, size, [length])
    whole = 4 * heads * size * length**2
    layers = scale.text["num_hidden_layers"]
    assert got == shapes.decoder_flops(scale, [length]) + layers * (whole - causal)

    pixels = torch.randn(2, 3, scale.image_size, scale.image_size)
    embed = run.runner.model.embed_images
    assert counted(lambda: embed(pixel_values=pixels)) == shapes.tower_flops(scale, 2)


class FakeEvent:
    """A CUDA event of a device that does all at once, but lags behind where `lags` is set."""

    lags = True

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.time = time.perf_counter()

    def query(self) -> bool:
        return not self.lags

    def elapsed_time(self, other: FakeEvent) -> float:
        return (other.time - self.time) * 1e3


@pytest.mark.parametrize("lags", [True, False])
def test_steps_are_queued_behind_a_device_that_is_held(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, lags: bool
) -> None:
    """The path of a card, with a card's part played: a longer step is queued fewer times."""
    model = importlib.import_module("gpu_sections.model")
    shapes = importlib.import_module("gpu_sections.shapes")
    run = importlib.import_module("gpu_sections.run").Run(CPU, shapes.TINY, tmp_path, {})
    launch, num_launched, holds = run.runner.launch, 0, list[int]()

    def counted(batch: Any) -> Any:
        nonlocal num_launched
        num_launched += 1
        return launch(batch)

    monkeypatch.setattr(run.runner, "launch", counted)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "lags", lags)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "_sleep", holds.append)
    run.device = torch.device("cuda", 0)
    seconds, ahead = model.device_seconds(run, 2, computed=20, new=1)
    assert seconds > 0 and ahead == lags
    assert all(0 < cycles <= 1e9 for cycles in holds)
    rounds = 5 if lags else len(holds)
    assert len(holds) == rounds and num_launched >= 2 + rounds
    assert importlib.import_module("gpu_sections.measure").measure(lambda: None, run.device) > 0


def test_tests_that_fail_or_take_too_long_are_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    parts = importlib.import_module("gpu_sections.tests")
    measure = importlib.import_module("gpu_sections.measure")
    run_module = importlib.import_module("gpu_sections.run")
    shapes = importlib.import_module("gpu_sections.shapes")
    endless = "import time; print('begun', flush=True); time.sleep(60)"
    start = time.perf_counter()
    assert parts.finished([sys.executable, "-S", "-c", endless], 3.0) == (None, "begun\n")
    assert time.perf_counter() - start < 30
    out = measure.Section()
    run = run_module.Run(CPU, shapes.TINY, tmp_path, {})
    monkeypatch.setattr(parts, "finished", lambda *_: (1, "FAILED a::b\n1 failed in 2s\n\n"))
    with pytest.raises(RuntimeError, match="exit status 1: 1 failed in 2s"):
        parts.card_tests(["a"], 60.0)(run, out)
    assert out.details["exit_status"] == 1 and out.details["failed"] == ["FAILED a::b"]
