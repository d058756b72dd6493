"""One server with the demo checkpoint for all tests that don't end it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from mm_engine.plugins.discovery import demos
from pictures import data_url, encode, quarters
from serving import FLAGS, KEY, ServerProcess


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One that has an event for each step of the engine."""
    flags = (*FLAGS, "--output-interval", "0")
    with ServerProcess(tmp_path_factory.mktemp("server"), *flags) as started:
        yield started


#: Works for every picture but two, whose width chooses the fault.
FAULTY_PLUGIN = """
from mm_engine.plugins import expand_placeholders, hookimpl, placeholder_token_id
from mm_llava.counts import num_image_tokens
from mm_llava.plugin import max_tokens, model_class


@hookimpl
def input_processor(ctx, inputs):
    widths = [image.width for image in inputs.multi_modal_data["image"]]
    if 14 in widths:
        raise SystemExit("the plugin wants to end it all")
    count = num_image_tokens(ctx.hf_config) - (13 in widths)
    return expand_placeholders(inputs, placeholder_token_id(ctx), [count] * len(widths))
"""


@pytest.fixture(scope="session")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with a key and a faulty plugin, that takes two prompts at once and runs one."""
    folder = tmp_path_factory.mktemp("strict")
    plugin = folder / "faulty.py"
    plugin.write_text(FAULTY_PLUGIN)
    flags = (
        *("--max-queued-requests", "2"),
        *("--max-num-seqs", "1"),
        *("--limit-mm-per-prompt", "image=1"),
        *("--served-model-name", "first", "--served-model-name", "second"),
        *("--kv-cache-memory", "32MiB"),
        *("--plugin", str(plugin)),
    )
    with ServerProcess(folder, *flags, env={"MM_ENGINE_API_KEY": KEY}) as started:
        started.http.headers["Authorization"] = f"Bearer {KEY}"
        yield started


@pytest.fixture
def client(server: ServerProcess) -> Iterator[OpenAI]:
    with server.client() as opened:
        yield opened


@pytest.fixture(scope="session")
def image_url() -> str:
    return data_url(encode(quarters(96, 96)))


@pytest.fixture
def demo_copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the demo checkpoint that a test may damage."""
    copy = tmp_path_factory.mktemp("checkpoint") / "demo"
    shutil.copytree(min(demos().items())[1], copy)
    return copy
