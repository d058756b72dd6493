"""What transformers makes of images, called as its own processor calls it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import InternVLConfig, LlavaConfig, LlavaNextConfig, PretrainedConfig

from checkpoints import make_llava
from mm_engine.testing.oracle import Oracle, processor_options
from mm_engine.testing.random_checkpoint import random_model
from mm_engine.testing.sizes import picture

CONFIG = {
    "image_token_id": 5,
    "vision_config": {
        "model_type": "internvl_vision",
        "hidden_size": 16,
        "image_size": [16, 16],
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "patch_size": [8, 8],
    },
    "text_config": {
        "model_type": "qwen2",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
        "num_key_value_heads": 2,
        "vocab_size": 64,
    },
}
PREPROCESSOR = {
    "image_processor_type": "GotOcr2ImageProcessor",
    "crop_to_patches": False,  # the default; transformers' processor says True
    "max_patches": 4,
    "size": {"height": 16, "width": 16},
}


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (InternVLConfig, {"crop_to_patches": True}),
        (LlavaNextConfig, {"do_pad": True}),
        (LlavaConfig, {}),
        (PretrainedConfig, {}),
    ],
)
def test_options_are_those_of_the_processors_class(config: Any, options: dict[str, Any]) -> None:
    assert processor_options(config()) == options


def test_older_versions_of_transformers_keep_them_beside_the_class(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = pytest.importorskip("transformers.models.internvl.processing_internvl")

    options = {"crop_to_patches": True, "return_tensors": "pt"}
    beside = SimpleNamespace(_defaults={"images_kwargs": options})
    monkeypatch.setattr(module.InternVLProcessor, "images_kwargs", None, raising=False)
    monkeypatch.setitem(vars(module), "InternVLProcessorKwargs", beside)
    assert processor_options(InternVLConfig()) == {"crop_to_patches": True}


def test_soft_caps_count(tmp_path: Path) -> None:
    """Attention that the library has chosen by itself may leave them out."""
    oracle = Oracle(make_llava(tmp_path, backbone="gemma2"), 5)
    inputs = oracle.inputs([1, 9, 20, 30], [])
    capped, caps = oracle.logits(inputs), 0
    for module in oracle.model.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
            caps += 1
    assert caps and not torch.allclose(oracle.logits(inputs), capped)


def test_images_are_mapped_with_them(tmp_path: Path) -> None:
    random_model(InternVLConfig(**CONFIG)).save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    oracle = Oracle(tmp_path, 5)
    assert oracle.mapped([picture((32, 16))])["pixel_values"].shape == (3, 3, 16, 16)
    assert oracle.rows(picture((32, 16))).shape == (3, 16)
