"""A server that the load commands are let loose on, and the command line within this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from mm_engine.cli.main import app
from serving import KEY, ServerProcess

MODEL = ("llava-demo", "--dtype", "float32", "--kv-cache-memory", "32MiB")
#: Prompts that the server takes at the same time. A place is free again some time after its
#: stream has ended, so three clients can hold six.
MAX_QUEUED = 8


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """The demo, wanting a key, with a short queue."""
    flags = (*MODEL, "--max-queued-requests", str(MAX_QUEUED))
    folder = tmp_path_factory.mktemp("server")
    with ServerProcess(folder, *flags, env={"MM_ENGINE_API_KEY": KEY}) as process:
        yield process


@pytest.fixture
def bench() -> Callable[..., Result]:
    """`engine bench` with some arguments, in this process."""

    def run(*arguments: object, **environment: str) -> Result:
        words = ["bench", *map(str, arguments)]
        return CliRunner().invoke(app, words, env=environment)

    return run


@pytest.fixture
def load_from(
    bench: Callable[..., Result], tmp_path: Path
) -> Callable[[ServerProcess], Callable[..., tuple[Result, Any]]]:
    """`engine bench serve` against a server; what it printed, and the figures of its record."""

    def against(server: ServerProcess) -> Callable[..., tuple[Result, Any]]:
        def run(*arguments: object) -> tuple[Result, Any]:
            file = tmp_path / "record.json"
            where = ("--base-url", server.url, "--json", file)
            done = bench("serve", *where, *arguments, MM_ENGINE_API_KEY=KEY)
            return done, json.loads(file.read_text()) if file.exists() else None

        return run

    return against


@pytest.fixture
def load(
    load_from: Callable[[ServerProcess], Callable[..., tuple[Result, Any]]], server: ServerProcess
) -> Callable[..., tuple[Result, Any]]:
    """The same against the server of the other tests."""
    return load_from(server)
