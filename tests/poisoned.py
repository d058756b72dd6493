"""A model that one token makes compute NaN."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from checkpoints import make_llava
from mm_engine.config import EngineConfig
from mm_engine.worker.loader import open_model
from mm_engine.worker.model_runner import ModelRunner

BLOCK, NUM_BLOCKS = 4, 32
POISON = 77  # the token whose embedding is NaN


def make_poisoned(folder: Path, backbone: str, **options: Any) -> ModelRunner:
    """The model, with a sliding window of 3 if it is a Mistral, and a cache of `NUM_BLOCKS`."""
    changes = {"sliding_window": 3} if backbone == "mistral" else {}
    path = make_llava(folder, backbone=backbone, text_changes=changes)
    options |= {"device": "cpu", "block_size": BLOCK, "progress": False}
    config = EngineConfig(model=str(path), **options)
    runner = ModelRunner(open_model(config), config)
    runner.model.language_model.embedding.weight.data[POISON] = float("nan")
    runner.init_cache(NUM_BLOCKS)
    return runner
