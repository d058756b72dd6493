"""The engine starts and answers without flash-attn, without Triton and without both, and says why.

In processes of their own, in which the packages can't be imported as if they weren't installed.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mm_engine.plugins.discovery import demos
from serving import FLAGS, ServerProcess, environment

#: Of our own kernels for the CPU, or where they weren't built of PyTorch's.
LINE = re.compile(r"Attention: (cpu [a-z0-9_]+|torch \(cpu can't run: .+\))$", re.MULTILINE)
#: Python imports it when it starts.
SITECUSTOMIZE = """
import os
from importlib.machinery import PathFinder

def find_spec(name, path=None, target=None, find=PathFinder.find_spec):
    absent = name.partition(".")[0] in os.environ["ABSENT"].split()
    return None if absent else find(name, path, target)

PathFinder.find_spec = find_spec
"""
#: Answers with the backend that auto takes and with Triton; prints the ids, or why not.
ASK = """
import logging, sys
from mm_engine import LLM, SamplingParams
from mm_engine.errors import StartupError

logging.basicConfig(level=logging.INFO, format="%(message)s")
params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
for backend in ("auto", "triton"):
    options = {"dtype": "float32", "device": "cpu", "kv_cache_memory": 2**22, "progress": False}
    options |= {"max_model_len": 64, "max_num_seqs": 4, "limit_mm_per_prompt": {"image": 0}}
    try:
        llm = LLM(attention_backend=backend, **options)
    except StartupError as error:
        print(f"{backend} refused: {error}")
    else:
        (output,) = llm.generate("Hello there", params, use_tqdm=False)
        print(f"{backend} answers: {list(output.outputs[0].token_ids)}")
"""


def without(*packages: str, folder: Path) -> dict[str, str]:
    """The environment of a process that can't import `packages`."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(SITECUSTOMIZE, "utf-8")
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    return {"PYTHONPATH": path, "ABSENT": " ".join(packages), "TRITON_INTERPRET": "1"}


def ask(tmp_path: Path, *absent: str) -> tuple[str, str]:
    """What `ASK` prints and what it logs."""
    done = subprocess.run(
        [sys.executable, "-c", ASK],
        env=environment(tmp_path / "tmp", **without(*absent, folder=tmp_path / "site")),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_without_flash_attn_it_answers_on_a_cpu_and_by_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="triton isn't installed")
    printed, logged = ask(tmp_path, "flash_attn")
    assert logged.count("Attention: ") == 2  # one for each engine
    assert LINE.search(logged)
    assert re.search(r"^Attention: triton [\d.]+ \(as asked\)$", logged, re.MULTILINE)
    (answers,) = {line.split(" answers: ")[1] for line in printed.splitlines()}
    assert answers.count(",") == 2


def test_without_triton_it_answers_on_a_cpu_and_says_what_to_install(tmp_path: Path) -> None:
    printed, logged = ask(tmp_path, "triton")
    assert logged.count("Attention: ") == 1
    assert LINE.search(logged)
    assert "auto answers: [" in printed
    refused = "triton refused: attention backend can't serve this model here: "
    assert f"{refused}triton isn't installed: pip install 'mm-engine[cuda]'. Change " in printed


def test_without_both_a_server_answers_and_its_log_says_why_once(tmp_path: Path) -> None:
    env = without("flash_attn", "triton", folder=tmp_path / "site")
    flags = (*FLAGS, "--device", "cpu")
    with (
        ServerProcess(tmp_path, min(demos()), *flags, env=env, fresh=True) as server,
        server.client() as client,
    ):
        answer = client.completions.create(model="demo", prompt="Hello", max_tokens=3)
        assert answer.usage is not None and answer.usage.completion_tokens
        lines = [line for line in server.output.splitlines() if "Attention: " in line]
    assert len(lines) == 1
    assert re.search(r" INFO engine \[\d+\]: Attention: ", lines[0])
    assert LINE.search(lines[0])
