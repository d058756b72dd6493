"""Real distributions to find and load: a dist-info folder and modules, put on sys.path."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessorPil, LlavaConfig, PreTrainedTokenizerFast

from mm_engine.config import ModelContext
from mm_engine.plugins.discovery import PluginRecord, load
from mm_engine.plugins.plugin import Plugin

ARCHITECTURE = "TestForConditionalGeneration"
IMAGE_TOKEN_ID = 3
MAX_TOKENS = 4

HOOKS = """
from mm_engine.plugins import *
import dataclasses, time, torch
from torch import nn
@hookimpl
def model_class(ctx): return nn.Identity
@hookimpl
def max_tokens(ctx, modality): return 4
"""


@pytest.fixture(autouse=True)
def modules_are_forgotten() -> Iterator[None]:
    """Plugins of one test aren't found imported by the next."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("mm_test", "mm_engine_file", "mm_other")):
            del sys.modules[name]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """`install(name, version, entry_points, files)`: a distribution in a folder of its own."""

    def install(
        name: str,
        version: str = "0.1.0",
        architectures: Mapping[str, str] | None = None,
        files: Mapping[str, str] | None = None,
        demos: Mapping[str, str] | None = None,
    ) -> Path:
        folder = tmp_path / f"{name}-{version}-{len(list(tmp_path.iterdir()))}"
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = ["[mm_engine.plugins]"]
        lines += [f"{key} = {value}" for key, value in (architectures or {}).items()]
        lines += ["[mm_engine.demos]"]
        lines += [f"{key} = {value}" for key, value in (demos or {}).items()]
        (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
        for path, text in (files or {}).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(textwrap.dedent(text))
        monkeypatch.syspath_prepend(str(folder))
        return folder

    return install


@pytest.fixture
def make_plugin(install: Callable[..., Path]) -> Callable[..., Plugin]:
    """`make_plugin(source)`: mm-test 0.1.0 with the required hooks and `source`, loaded."""

    def make_plugin(
        source: str = "", *, hooks: str = HOOKS, timeout: float | None = None
    ) -> Plugin:
        source = hooks + textwrap.dedent(source)
        files = {"mm_test/__init__.py": "", "mm_test/plugin.py": source}
        install("mm-test", "0.1.0", {ARCHITECTURE: "mm_test.plugin"}, files)
        record = PluginRecord("mm-test", "0.1.0", "mm_test.plugin", ARCHITECTURE)
        return load(record, timeout=timeout)

    return make_plugin


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an image processor that crops to 16x16."""
    folder = tmp_path_factory.mktemp("checkpoint")
    size = {"height": 16, "width": 16}
    CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=size).save_pretrained(folder)
    return folder


@pytest.fixture
def ctx(checkpoint: Path) -> ModelContext:
    """A model of 64 tokens whose image token is `<image>`, id 3."""
    words = {"<unk>": 0, "a": 1, "b": 2, "<image>": IMAGE_TOKEN_ID, "<s>": 4}
    model = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model, unk_token="<unk>", bos_token="<s>")
    return ModelContext(
        hf_config=LlavaConfig(image_token_index=IMAGE_TOKEN_ID),
        checkpoint=checkpoint,
        tokenizer=tokenizer,
        dtype=torch.float32,
        max_model_len=64,
        limits={"image": 8},
        architecture=ARCHITECTURE,
    )
