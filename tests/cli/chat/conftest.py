"""A server with the demo for all conversations that don't end it, and scripted conversations."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pictures import quarters
from serving import ENGINE, FLAGS, ServerProcess, environment

Scripted = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def chat_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    with ServerProcess(tmp_path_factory.mktemp("chat-server"), *FLAGS) as started:
        yield started


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture at a path that a shell would split."""
    path = tmp_path / "it's a picture.png"
    quarters(96, 96).save(path)
    return path


@pytest.fixture
def scripted(tmp_path: Path) -> Scripted:
    """`engine chat` with these lines on stdin: `scripted(["What?"], "--url", …)`."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()

    def run(
        lines: list[str], *flags: str, key: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        command = [ENGINE, "chat", *flags]
        variables = {"MM_ENGINE_API_KEY": key} if key else {}
        done = subprocess.run(  # a new interpreter: what is forked has its stdin already
            command,
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            env=environment(temporary, **variables),
            text=True,
            errors="surrogateescape",
            timeout=120,
            check=False,
        )
        assert list(temporary.rglob("*")) == []
        return done

    return run
