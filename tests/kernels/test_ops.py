"""Which kernels an op runs: decided once for each type of device, and said in one line."""

from __future__ import annotations

import builtins
import subprocess
import sys
from typing import Any

import pytest
import torch
from mm_engine_kernels import ops, reference


@pytest.fixture(autouse=True)
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is decided yet; what a test decides is forgotten."""
    monkeypatch.setattr(ops, "_kernels", ops._Kernels())
    monkeypatch.setattr(ops, "_chosen", {})


def test_a_cpu_runs_the_cpp_kernels() -> None:
    extension = pytest.importorskip("mm_engine_kernels.cpu.extension", exc_type=ImportError)
    assert ops.chosen("cpu").name == "cpp"
    assert str(ops.chosen("cpu")) == f"cpp ({extension.isa()})"


def test_a_cpu_without_them_runs_the_reference_and_says_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delitem(sys.modules, "mm_engine_kernels.cpu.extension", raising=False)
    monkeypatch.delattr("mm_engine_kernels.cpu.extension", raising=False)
    monkeypatch.setitem(sys.modules, "mm_engine_kernels._cpu", None)
    monkeypatch.delattr("mm_engine_kernels._cpu", raising=False)
    chosen = ops.chosen("cpu")
    assert chosen.name == "reference"
    (why_not,) = chosen.why_not
    assert why_not.startswith("the C++ kernels can't be loaded: ")
    assert "install a wheel of mm-engine-kernels" in why_not
    x = torch.randn(2, 8)
    assert torch.equal(ops.silu_mul(x), reference.silu_mul(x))
    assert ops.pack_linear(x) is None


def test_devices_that_nobody_thought_of_run_the_reference() -> None:
    assert ops.chosen("xpu").name == "reference"


def test_a_card_runs_triton(kernels: Any) -> None:
    assert ops.chosen("cuda").name == "triton"
    assert ops.chosen("cuda").why_not == ()


def without_triton(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    importing = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "triton":
            raise error
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ModuleNotFoundError("No module named 'triton'", name="triton"),
            "triton isn't installed: pip install 'mm-engine[cuda]'",
        ),
        (
            ImportError("libcuda.so.1: cannot open\nshared object file"),
            "triton can't be imported: ImportError: libcuda.so.1: cannot open",
        ),
        (
            ModuleNotFoundError("No module named 'setuptools'", name="setuptools"),
            "triton can't be imported: No module named 'setuptools'",
        ),
    ],
    ids=["missing", "broken", "incomplete"],
)
def test_without_triton_a_card_runs_the_reference_and_says_why(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_triton(monkeypatch, error)
    chosen = ops.chosen("cuda")
    assert (chosen.name, chosen.why_not) == ("reference", (said,))
    assert str(chosen) == f"reference (torch {torch.__version__}); {said}"
    with pytest.raises(ops.Unavailable, match="triton"):
        ops.use("cuda", "triton")


def test_kernels_can_be_named(kernels: Any, device: str) -> None:
    ops.use(device, "triton")
    assert ops.chosen(device).name == "triton"
    x = torch.randn(1, 1, 8, device=device)
    caches = torch.zeros(2, 1, 4, 1, 8, device=device)
    ops.write_kv(x, x, caches[0], caches[1], torch.tensor([2], device=device))
    assert torch.equal(caches[0, 0, 2], x[0])
    ops.use(device, "reference")
    assert ops.chosen(device).name == "reference"


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="kernels are not known: metal. Use one of: reference, "):
        ops.use("cpu", "metal")


def test_every_op_has_its_meaning_and_its_entry(kernels: Any) -> None:
    for name in ops.OPS:
        assert callable(getattr(reference, name)) and callable(getattr(ops, name))
        assert callable(getattr(kernels, name))
    assert set(ops.TRITON_FILES) <= set(ops.OPS)


def test_importing_the_ops_imports_no_triton() -> None:
    code = (
        "import sys, mm_engine_kernels.ops, mm_engine_kernels.triton as t; "
        "assert t.__file__; assert 'triton' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_cpu_refuses_triton_without_its_interpreter() -> None:
    pytest.importorskip("triton", reason="triton isn't installed: pip install triton")
    code = (
        "from mm_engine_kernels import ops\n"
        "try: ops.use('cpu', 'triton')\n"
        "except ops.Unavailable as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": ":".join(sys.path)},
        check=True,
        capture_output=True,
        text=True,
    )
    assert "triton doesn't run on cpu: set TRITON_INTERPRET=1" in done.stdout
