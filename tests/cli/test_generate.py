"""`engine generate`: one answer in the terminal."""

from __future__ import annotations

import subprocess
from pathlib import Path

from mm_engine import LLM, SamplingParams
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
