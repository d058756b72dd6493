"""`engine generate`: one answer in the terminal."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mm_engine import LLM, SamplingParams
from mm_engine.cli.main import app
from mm_engine.engine.client import EngineClient
from mm_engine.errors import EngineDead
from mm_engine.plugins.discovery import demos
from pictures import quarters
from serving import ENGINE, environment


def test_the_answer_is_the_librarys(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    quarters(96, 96).save(picture)
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    question = "Describe the image."
    flags = ["--dtype", "float32", "--kv-cache-memory", "32MiB", "--max-tokens", "12"]
    done = subprocess.run(
        [ENGINE, "generate", "-i", str(picture), *flags, question],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment(temporary),
        check=True,
    )
    llm = LLM(min(demos()), dtype="float32", kv_cache_memory=2**25, progress=False)
    parts = [{"type": "image", "image": quarters(96, 96)}, {"type": "text", "text": question}]
    (expected,) = llm.chat(
        [{"role": "user", "content": parts}], SamplingParams(temperature=0, max_tokens=12)
    )
    assert done.stdout == expected.outputs[0].text.lstrip() + "\n"
    assert expected.outputs[0].text
    assert list(temporary.rglob("*")) == []


@pytest.mark.parametrize("num_pictures", [0, 1, 2])
def test_startup_tries_out_as_many_pictures_as_the_question_has(
    num_pictures: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits, tried = [], []

    async def start(config: Any, profile: Any, *_: Any) -> None:
        limits.append(config.limit_mm_per_prompt)
        tried.append(len(profile.items))
        raise EngineDead("this test needs no answer.")

    monkeypatch.setattr(EngineClient, "start", start)
    monkeypatch.setattr(
        "mm_engine.cli.generate.import_transformers", lambda *_: None
    )  # this process has it all
    picture = tmp_path / "picture.png"
    quarters(32, 32).save(picture)
    pictures = num_pictures * ["-i", str(picture)]
    done = CliRunner().invoke(app, ["generate", *pictures, "-m", min(demos()), "What is it?"])
    assert isinstance(done.exception, EngineDead)
    assert limits == [{"image": num_pictures}]
    assert tried == [min(num_pictures, 1)]  # on a CPU one of them
