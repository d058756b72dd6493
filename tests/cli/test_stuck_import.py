"""A plugin whose import doesn't end: the server can be stopped in it."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from serving import ENGINE


@pytest.mark.parametrize("body", ["time.sleep(9999)", "(lambda a: (a @ a).softmax(0))(ones)"])
def test_sigterm_in_a_plugins_import_is_not_the_plugins_fault(tmp_path: Path, body: str) -> None:
    started, file = tmp_path / "started", tmp_path / "stuck.py"
    file.write_text(
        f"import time, torch\nones = torch.ones(512, 512)\nopen({str(started)!r}, 'w').close()\n"
        f"while True: {body}\n"
    )
    process = subprocess.Popen(
        [ENGINE, "serve", "llava-demo", "--plugin", str(file), "--port", "0"],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 120
    while not started.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert (process.returncode, "imported" in errors, "terminate" in errors) == (0, False, False)
