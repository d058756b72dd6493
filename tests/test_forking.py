"""What is forked is as a new interpreter would be, and tests use it where they think they do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import forking

SHOW = """
import json, os, signal, sys
signals = [str(signal.getsignal(n)) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE)]
ours = [name for name in sys.modules if name.startswith("mm_")]
print(json.dumps([sys.argv[1:], sys.path, os.getcwd(), os.getppid(), signals, ours, __name__,
    dict(os.environ), sorted(os.listdir("/proc/self/fd"))[:4]]))
print("torch" in sys.modules, file=sys.stderr)
sys.exit(7)
"""


def test_a_forked_process_is_as_a_new_one_with_torch_imported(tmp_path: Path) -> None:
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    env = {**os.environ, "PYTHONPATH": str(tmp_path), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script), "one", "two"]
    done = [
        forking.run(command, timeout=60, env=env, popen=popen)
        for popen in (subprocess.Popen, forking.Popen)
    ]
    assert [one.returncode for one in done] == [7, 7]
    assert [one.stderr for one in done] == ["False\n", "True\n"]
    new, forked = (json.loads(one.stdout) for one in done)
    for seen in (new, forked):
        seen[7].pop("LC_CTYPE", None)  # Python may set it for itself
    assert forked[:8] == new[:8]


def test_what_would_be_imported_otherwise_is_not_forked(tmp_path: Path) -> None:
    server = forking.fork_server()
    assert server.suits(dict(os.environ))
    assert not server.suits({**os.environ, "HF_HUB_OFFLINE": "0"})
    (tmp_path / "transformers.py").touch()
    assert not server.suits({**os.environ, "PYTHONPATH": str(tmp_path)})
