"""Every kernel compiles for cards of several kinds, and fits their shared memory and registers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

KIB = 1024
#: Shared memory of one program, by capability.
SHARED = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB}
#: Bytes of a thread that lie in memory instead of a register; a few cost nothing.
MAX_STACK, MAX_STACK_BEFORE_3_9 = 32, 40

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton isn't installed: pip install triton",
)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """One process compiles all: this one may hold the interpreter's kernels."""
    folder = tmp_path_factory.mktemp("compiled")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    environment["TRITON_CACHE_DIR"] = str(folder)
    script = Path(__file__).with_name("compiling.py")
    done = subprocess.run(
        [sys.executable, script, folder], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_fit_the_cards(compiled: list[dict[str, Any]]) -> None:
    assert {record["arch"] for record in compiled} == {80, 86, 90}
    is_new = Version(version("triton")) >= Version("3.9")
    for record in compiled:
        assert record["shared"] <= SHARED[record["arch"]], record
        assert record["stack"] <= (MAX_STACK if is_new else MAX_STACK_BEFORE_3_9), record


def test_every_kernel_is_compiled(compiled: list[dict[str, Any]]) -> None:
    folder = Path(__file__).parents[2] / "kernels" / "mm_engine_kernels" / "triton"
    sources = [path.read_text("utf-8") for path in folder.glob("*.py")]
    written = {name for source in sources for name in re.findall(r"def (\w+_kernel)\(", source)}
    assert written == {record["kernel"] for record in compiled}


def test_prefill_runs_on_the_newest_matrix_units(compiled: list[dict[str, Any]]) -> None:
    for record in compiled:
        if record["launch"] in ("prefill-64", "prefill-128", "prefill-128-fp8"):
            assert record["wgmma"] == (record["arch"] == 90), record
