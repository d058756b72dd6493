"""`engine plugins list` beside plugins that would end or stop whoever imports them."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from installing import HOOKS, write_distribution
from mm_engine.cli import plugins

LIMIT = 5.0  # seconds


def test_plugin_that_hangs_or_ends_the_interpreter_is_only_its_own_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {
        "mm-test-good": HOOKS,
        "mm-test-hangs": "import time; time.sleep(1000)",
        "mm-test-dies": "import os; os._exit(0)",
        "mm-test-prints": f"print('to the terminal')\n{HOOKS}",
    }
    for name, source in code.items():
        module = name.replace("-", "_")
        files = {f"{module}.py": source}
        write_distribution(tmp_path, name, plugins={f"Of{module}": module}, files=files)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(plugins, "MAX_IMPORT_SECONDS", LIMIT)
    start = time.monotonic()
    done = CliRunner().invoke(plugins.app, ["list", "--json"], catch_exceptions=False)
    seconds = time.monotonic() - start
    states = {row["distribution"]: row["state"] for row in json.loads(done.output)}
    assert states["mm-test-good"] == states["mm-test-prints"] == "ok"
    hangs, dies = states["mm-test-hangs"], states["mm-test-dies"]
    assert "can't be imported: mm_test_hangs takes longer than 5 s" in hangs
    assert "mm_test_dies ended the interpreter with exit code 0" in dies
    assert seconds < LIMIT + 60
    assert not [name for name in sys.modules if name.startswith("mm_test")]
