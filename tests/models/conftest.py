"""A checkpoint, what transformers loads from it, and the same weights in other files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from checkpoints import make_llava

Weights = Mapping[str, Tensor]
Rewrite = Callable[..., Path]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint as `save_pretrained` writes it, with a backbone that isn't tied."""
    return make_llava(tmp_path_factory.mktemp("saved"))


@pytest.fixture(scope="session")
def weights(saved: Path) -> dict[str, Tensor]:
    """Its tensors by the names that transformers gives them in memory."""
    model = LlavaForConditionalGeneration.from_pretrained(saved, dtype=torch.float32)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


@pytest.fixture
def rewrite(tmp_path: Path) -> Rewrite:
    """`rewrite(checkpoint, tensors, num_shards=1)`: a copy of it with other weights."""

    def rewrite(checkpoint: Path, tensors: Weights, num_shards: int = 1) -> Path:
        folder = tmp_path / f"checkpoint-{len(list(tmp_path.iterdir()))}"
        ignored = shutil.ignore_patterns("*.safetensors", "*.index.json")
        shutil.copytree(checkpoint, folder, ignore=ignored)
        # Neighbours go to different shards, so that the parts of a fused layer come apart.
        shards = [sorted(tensors)[i::num_shards] for i in range(num_shards)]
        files = [f"model-{i + 1:05}-of-{num_shards:05}.safetensors" for i in range(num_shards)]
        files = files if num_shards > 1 else ["model.safetensors"]
        for file, names in zip(files, shards, strict=True):
            save_file({name: tensors[name].contiguous().clone() for name in names}, folder / file)
        if num_shards > 1:
            pairs = zip(files, shards, strict=True)
            write_index(folder, {name: file for file, names in pairs for name in names})
        return folder

    return rewrite


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """The index of a sharded checkpoint."""
    text = json.dumps({"metadata": {"total_size": 0}, "weight_map": dict(weight_map)})
    (folder / "model.safetensors.index.json").write_text(text)
