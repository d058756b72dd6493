"""Tied embeddings, whichever of the two a checkpoint brings; and what must not be loaded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from checkpoints import make_llava
from mm_engine.config import EngineConfig
from mm_engine.errors import StartupError
from mm_engine.worker.loader import LoadedModel, load_model, open_model

Weights = dict[str, Tensor]
Rewrite = Callable[..., Path]
HEAD, EMBEDDINGS = "language_model.lm_head.weight", "language_model.model.embed_tokens.weight"


def load(path: Path, **options: Any) -> LoadedModel:
    config = EngineConfig(model=str(path), **{"progress": False, **options})
    return load_model(open_model(config), torch.device("cpu"))


def with_equal_head(weights: Weights) -> Weights:
    return {**weights, HEAD: weights[EMBEDDINGS]}


def with_other_head(weights: Weights) -> Weights:
    return {**weights, HEAD: weights[EMBEDDINGS] * 2}


def with_head_only(weights: Weights) -> Weights:
    return {HEAD if name == EMBEDDINGS else name: tensor for name, tensor in weights.items()}


@pytest.mark.parametrize("num_shards", [1, 3], ids=["one-file", "sharded"])
@pytest.mark.parametrize(
    ("change", "tied"),
    [(dict, True), (with_equal_head, True), (with_other_head, False), (with_head_only, True)],
    ids=["without-head", "equal-head", "other-head", "head-only"],
)
def test_tied_embeddings_are_what_transformers_makes_of_them(
    change: Callable[[Weights], Weights],
    tied: bool,
    num_shards: int,
    tmp_path: Path,
    rewrite: Rewrite,
) -> None:
    saved = make_llava(tmp_path / "saved", backbone="qwen2")
    path = rewrite(saved, change(load_file(saved / "model.safetensors")), num_shards)
    oracle = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    model = load(path).model
    assert (model.language_model.lm_head is None) == tied
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([0, 5, 7])
    with torch.no_grad():
        torch.testing.assert_close(model.compute_logits(hidden), oracle.lm_head(hidden))
        assert torch.equal(model.embed_tokens(ids), oracle.get_input_embeddings()(ids))


def test_tied_embeddings_that_are_in_no_file_are_missing(tmp_path: Path, rewrite: Rewrite) -> None:
    saved = make_llava(tmp_path / "saved", backbone="qwen2")
    weights = load_file(saved / "model.safetensors")
    del weights[EMBEDDINGS]
    with pytest.raises(StartupError, match="language_model.embed_tokens.weight"):
        load(rewrite(saved, weights))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn], ids=str)
def test_quantised_tensors_are_not_taken_for_numbers(
    dtype: torch.dtype, saved: Path, rewrite: Rewrite
) -> None:
    weights = load_file(saved / "model.safetensors")
    weights[HEAD] = weights[HEAD].to(dtype)
    with pytest.raises(StartupError, match=rf"dtype of {HEAD} .* not supported: {dtype}"):
        load(rewrite(saved, weights))


def test_a_quantised_checkpoint_is_refused_by_its_config(saved: Path, rewrite: Rewrite) -> None:
    path = rewrite(saved, {"x": torch.zeros(1)})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StartupError, match="quantised checkpoints are not supported"):
        load(path)


def test_a_single_file_wins_over_an_index(saved: Path, rewrite: Rewrite) -> None:
    """As in transformers: an index that is left over from before must not be followed."""
    path = rewrite(saved, load_file(saved / "model.safetensors"))
    index = {"weight_map": {"x": "gone.safetensors"}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert load(path).num_parameters > 0


def test_loading_shows_a_progress_bar_on_stderr(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    load(saved, progress=True)
    captured = capsys.readouterr()
    assert "Loading weights" in captured.err
    assert captured.out == ""
    load(saved)
    assert "Loading weights" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"load_format": "pickle"}, "load format is not known: pickle."),
        ({"dtype": "int8"}, "dtype is not known: int8."),
        ({"max_model_len": 10_000}, "max_model_len is out of range: 10000."),
        ({"max_model_len": 0}, "max_model_len is out of range: 0."),
    ],
    ids=str,
)
def test_options_that_contradict_the_checkpoint_are_refused(
    saved: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(StartupError, match=message):
        load(saved, **options)


def test_a_plugin_may_bring_the_class_of_the_config(tmp_path: Path) -> None:
    """It is loaded before config.json is made a config; for one that nobody serves it is named."""
    (tmp_path / "config.json").write_text('{"architectures": ["Own"], "model_type": "own_type"}')
    config = EngineConfig(model=str(tmp_path), progress=False)
    with pytest.raises(StartupError, match="no installed plugin serves .* Own"):
        open_model(config)
    plugin = tmp_path / "own_plugin.py"
    plugin.write_text(
        "from transformers import AutoConfig, PretrainedConfig\n"
        "from mm_engine.plugins import hookimpl\n"
        "from torch import nn\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own_type'\n"
        "AutoConfig.register('own_type', OwnConfig)\n"
        "@hookimpl\ndef model_class(ctx): return nn.Identity\n"
        "@hookimpl\ndef max_tokens(ctx, modality): return 1\n"
    )
    config = EngineConfig(model=str(tmp_path), plugins=(str(plugin),), progress=False)
    with pytest.raises(StartupError, match="tokenizer can't be read"):  # it comes after the config
        open_model(config)
