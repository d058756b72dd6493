"""The keywords of `embed_images` are held to the mapper's tensors at startup."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from checkpoints import make_llava
from mm_engine import LLM, SamplingParams
from mm_engine.engine import build
from mm_engine.errors import PluginError
from pictures import quarters

PLUGIN = """
from mm_engine.plugins import hookimpl
import torch
ARCHITECTURES = ["LlavaForConditionalGeneration"]
@hookimpl
def model_class(ctx):
    from mm_llava.model import LlavaForConditionalGeneration as Parent
    class Model(Parent):
        {method}
    return Model
@hookimpl
def max_tokens(ctx, modality): return 16
@hookimpl
def register_input_mapper(ctx, register): register("image", mapper)
def mapper(ctx, image): return {{"pixels": torch.zeros(3, 32, 32), "scale": torch.ones(1)}}
"""
BODY = "return super().embed_images(pixel_values=pixels)"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("checkpoint"))


def load(checkpoint: Path, folder: Path, method: str) -> LLM:
    file = folder / "own_plugin.py"
    file.write_text(PLUGIN.format(method=method))
    return LLM(str(checkpoint), plugins=(str(file),), progress=False)


@pytest.mark.parametrize(
    "signature",
    ["self, *, pixels, scale", "self, pixels, scale, more=None", "self, pixels, **others"],
)
def test_method_that_takes_the_mappers_tensors_is_served(
    checkpoint: Path, tmp_path: Path, signature: str
) -> None:
    llm = load(checkpoint, tmp_path, f"def embed_images({signature}): {BODY}")
    prompt = {"prompt": "<image>", "multi_modal_data": {"image": quarters()}}
    output = llm.generate(prompt, SamplingParams(max_tokens=2, ignore_eos=True))[0]
    assert output.error is None
    assert len(output.outputs[0].token_ids) == 2


@pytest.mark.parametrize("most_flops", [math.inf, 0.0])  # 0: images aren't tried
@pytest.mark.parametrize(
    ("signature", "got"),
    [
        ("self, *, pixels", r"\['pixels'\]"),
        ("self, *, pixels, scale, more", r"\['pixels', 'scale', 'more'\]"),
        ("self, *, pixel_values", r"\['pixel_values'\]"),
        ("self, pixels, /, **scale", r"\['pixels', 'scale'\]"),
    ],
)
def test_method_that_does_not_is_refused_at_startup(
    checkpoint: Path,
    tmp_path: Path,
    signature: str,
    got: str,
    most_flops: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "MOST_TRIAL_FLOPS", most_flops)
    expected = (
        r"own_plugin\.py sha256:\w+ · embed_images \(own_plugin\.py:\d+\): expected the mapper's"
        rf" tensors \['pixels', 'scale'\] as keywords, got {got}\."
    )
    with pytest.raises(PluginError, match=expected):
        load(checkpoint, tmp_path, f"def embed_images({signature}): {BODY}")


def test_model_without_the_method_is_refused_at_startup(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(PluginError, match=r"embed_images.*expected a method .*, got none"):
        load(checkpoint, tmp_path, "embed_images = None")
