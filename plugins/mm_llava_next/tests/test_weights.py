"""Every layout of names in circulation gives the weights that transformers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_llava_next
from mm_engine.config import EngineConfig
from mm_engine.errors import StartupError
from mm_engine.worker.loader import load_model, open_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlavaNextForConditionalGeneration

#: From the names in transformers' memory to those in a file.
LAYOUTS = {
    "hub": {
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.": "",
    },
    "in-memory": {},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava_next(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def weights(saved: Path) -> dict[str, Tensor]:
    model: Any = LlavaNextForConditionalGeneration.from_pretrained(saved, dtype=torch.float32)
    return dict(model.state_dict())


def load(path: Path) -> Any:
    config = EngineConfig(model=str(path), dtype="float32", device="cpu", progress=False)
    return load_model(open_model(config), torch.device("cpu")).model


def assert_same(model: Any, weights: dict[str, Tensor]) -> None:
    assert torch.equal(model.image_newline, weights["model.image_newline"])
    for name in ("linear_1.weight", "linear_2.bias"):
        expected = weights[f"model.multi_modal_projector.{name}"]
        assert torch.equal(model.multi_modal_projector.get_parameter(name), expected)
    name = "encoder.layers.1.mlp.fc1.weight"
    expected = weights[f"model.vision_tower.{name}"]
    assert torch.equal(model.vision_tower.get_parameter(name), expected)
    expected = weights["model.language_model.layers.1.mlp.down_proj.weight"]
    down = model.language_model.layers[1].mlp.down_proj
    vector = torch.arange(expected.shape[1], dtype=torch.float32)
    torch.testing.assert_close(down(vector[None])[0], expected @ vector)


def test_what_save_pretrained_writes_loads(saved: Path, weights: dict[str, Tensor]) -> None:
    assert "image_newline" in load_file(saved / "model.safetensors")
    assert_same(load(saved), weights)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_other_layouts_load(
    layout: str, saved: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    renamed = {}
    for name, tensor in weights.items():
        old = next((old for old in LAYOUTS[layout] if name.startswith(old)), "")
        renamed[LAYOUTS[layout].get(old, "") + name.removeprefix(old)] = tensor
    assert ("image_newline" in renamed) == (layout == "hub")
    save_file(renamed, link_all_but_weights(saved, tmp_path) / "model.safetensors")
    assert_same(load(tmp_path), weights)


def test_a_file_without_newline_is_refused(
    saved: Path, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    rest = {name: tensor for name, tensor in weights.items() if not name.endswith("newline")}
    save_file(rest, link_all_but_weights(saved, tmp_path) / "model.safetensors")
    with pytest.raises(StartupError, match="lacks 1 of the model's tensors, image_newline"):
        load(tmp_path)


def link_all_but_weights(saved: Path, folder: Path) -> Path:
    for file in saved.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).symlink_to(file)
    return folder
