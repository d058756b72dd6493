"""A checkpoint to prepare prompts for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from checkpoints import make_llava
from mm_engine.config import EngineConfig
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.worker.loader import open_model


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 checkpoint that tests don't change."""
    return make_llava(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture
def pipeline(checkpoint: Path) -> InputPipeline:
    """The pipeline of the checkpoint as it is."""
    return InputPipeline(open_model(EngineConfig(model=str(checkpoint))))


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint to change; its weights are missing."""
    return Path(
        shutil.copytree(
            checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors")
        )
    )


@pytest.fixture
def open_with(copy: Path) -> Callable[..., InputPipeline]:
    """`open_with(tokenizer, chat_template=…, **options)`: the checkpoint with another tokenizer."""

    def open_with(
        tokenizer: PreTrainedTokenizerFast, *, chat_template: str | None = None, **options: Any
    ) -> InputPipeline:
        for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
            (copy / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(copy)
        opened = open_model(EngineConfig(model=str(copy), **options))
        return InputPipeline(opened, chat_template=chat_template)

    return open_with
