"""The operator's guide names flags that exist, and sentences that the code says."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mm_engine.cli.main import app
from mm_engine.config import EngineConfig, default_queued_requests
from mm_engine.server.settings import ServerSettings

ROOT = Path(__file__).parents[1]
GUIDE = (ROOT / "docs" / "operate.md").read_text("utf-8")
SENTENCES = re.findall(r"^\| `([^`]+)` \|", GUIDE.partition("## When it says")[2], re.MULTILINE)


def said() -> str:
    """All text in the code, strings that are written in pieces joined."""
    texts = []
    for file in sorted((ROOT / "core").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


SAID = said()


def test_there_are_sentences() -> None:
    assert len(SENTENCES) > 15


@pytest.mark.parametrize("sentence", SENTENCES)
def test_each_sentence_is_said_by_the_code(sentence: str) -> None:
    assert sentence in SAID


def test_each_flag_exists() -> None:
    flags = set(re.findall(r"--[a-z][a-z-]+", GUIDE)) - {"--version"}
    shown = CliRunner().invoke(app, ["serve", "--help"], env={"COLUMNS": "200"}).output
    assert flags - set(re.findall(r"--[a-z][a-z-]+", shown)) == set()


def test_defaults_are_the_settings() -> None:
    fresh = ServerSettings(served_model_names=("x",))
    rows = dict(re.findall(r"^\| ([^|]+?) \| ([^|]+?) \|", GUIDE, re.MULTILINE))
    places = EngineConfig(model="m").max_num_seqs
    assert default_queued_requests(places) == places == fresh.max_queued_requests
    told = f"{places}: as many as run at once (`--max-num-seqs`), but at least"
    assert rows["prompts in flight"] == f"{told} {default_queued_requests(1)}"
    assert rows["tokens of prompts without an answer yet"] == f"{fresh.max_queued_tokens:,}"
    body = f"{fresh.max_body_bytes // 2**20} MiB, {fresh.body_timeout:g} s"
    assert rows["a body"] == body
    assert rows["a client that doesn't read its answer"] == f"{fresh.send_timeout:g} s"
    assert rows["compiling a grammar"].startswith(f"{fresh.grammar_timeout:g} s")
    assert f"`--drain-timeout` ({fresh.drain_timeout:g} s)" in GUIDE
