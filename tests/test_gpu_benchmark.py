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
            assert row["met"] in (True, False), row
    throughput = sections["throughput"]["details"]
    assert throughput["same_first"] == len(throughput["outputs"])  # the same weights, in float32
    assert any(row["name"].endswith("MHA: triton") for row in sections["attention"]["rows"])
    assert any(row["name"].endswith(": triton") for row in sections["kernels"]["rows"])
    assert sections["tests"]["details"]["last_line"].startswith("1 passed")
    printed = capsys.readouterr().out
    assert "decode, batch 3" in printed and "missed" in printed


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


def test_a_process_that_dies_leaves_what_it_had(
    gpu: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Also: what the processes are told arrives, and what they write comes back."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "if '--child' in sys.argv:\n"
        "    if 'decode' in open(sys.argv[sys.argv.index('--child') + 1]).read():\n"
        "        os.kill(os.getpid(), 9)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    sections = gpu("--processes", "--only", "machine", "floors", "decode")["sections"]
    assert sections["machine"]["status"] == sections["floors"]["status"] == "ok"
    assert sections["floors"]["details"]["copy_bytes_per_second"] > 0
    assert sections["decode"]["status"] == "error"
    assert "exit status -9" in sections["decode"]["error"]


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


def test_formulas_are_what_transformers_model_computes_and_holds(tmp_path: Path) -> None:
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
