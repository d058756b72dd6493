"""Every layout in circulation gives the same parameters, and what is wrong with a file is said."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from checkpoints import make_llava
from decoding import weights_of
from mm_engine import LLM, SamplingParams
from mm_engine.config import EngineConfig, Shard
from mm_engine.errors import StartupError
from mm_engine.models import weights as weights_module
from mm_engine.models.weights import Target, weight_targets
from mm_engine.worker.loader import load_model, open_model

Weights = dict[str, Tensor]
Rewrite = Callable[..., Path]
pytestmark = pytest.mark.usefixtures("reference_kernels")  # they leave weights as loaded

PREFIXES = {
    "hub": {
        "lm_head.": "language_model.lm_head.",
        "model.language_model.": "language_model.model.",
        "model.vision_tower.": "vision_tower.vision_model.",
        "model.multi_modal_projector.": "multi_modal_projector.",
    },
    "in-memory": {},
    "in-memory-older": {"model.vision_tower.": "model.vision_tower.vision_model."},
}
DOWN = "model.language_model.layers.1.mlp.down_proj.weight"


def rename(weights: Weights, layout: str) -> Weights:
    renamed = {}
    for name, tensor in weights.items():
        for old, new in PREFIXES[layout].items():
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        renamed[name] = tensor
    return renamed


def load_whole(checkpoint: Path, dtype: str = "float32", **options: Any) -> Any:
    """The plugin's model."""
    config = EngineConfig(
        model=str(checkpoint), dtype=dtype, device="cpu", progress=False, **options
    )
    return load_model(open_model(config), torch.device("cpu")).model


def load(checkpoint: Path, **options: Any) -> Weights:
    """What the plugin's model holds, by the names that a checkpoint may use."""
    return weights_of(load_whole(checkpoint, **options))


def refused(checkpoint: Path) -> str:
    """The one sentence or two with which loading is refused."""
    with pytest.raises(StartupError) as caught:
        load(checkpoint)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def assert_as_transformers(loaded: Weights, weights: Weights) -> None:
    assert len(loaded) > 60
    for name, tensor in loaded.items():
        in_memory = name.replace("language_model.lm_head", "lm_head")
        in_memory = in_memory if in_memory in weights else f"model.{name}"
        assert torch.equal(tensor, weights[in_memory].to(tensor.dtype)), name


@pytest.mark.parametrize("num_shards", [1, 3], ids=["one-file", "sharded"])
@pytest.mark.parametrize("layout", PREFIXES)
def test_every_layout_loads_what_transformers_loads(
    layout: str, num_shards: int, saved: Path, weights: Weights, rewrite: Rewrite
) -> None:
    folder = rewrite(saved, rename(weights, layout), num_shards)
    assert_as_transformers(load(folder), weights)


def test_what_save_pretrained_writes_loads(saved: Path, weights: Weights) -> None:
    assert_as_transformers(load(saved), weights)


def test_the_hub_layout_sharded_answers_as_what_save_pretrained_wrote(
    saved: Path, weights: Weights, rewrite: Rewrite
) -> None:
    hub = rewrite(saved, rename(weights, "hub"), 4)
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    answers = [
        LLM(str(path), max_model_len=64, progress=False).generate("What is in the", params)[0]
        for path in (saved, hub)
    ]
    first, second = (answer.outputs[0].token_ids for answer in answers)
    assert first == second and len(set(first)) > 2


def test_weights_are_converted_to_the_dtype_asked_for(saved: Path, weights: Weights) -> None:
    model = load_whole(saved, "float16")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float16}
    assert_as_transformers(weights_of(model), weights)


EMBEDDINGS, HEAD = "model.language_model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose output layer is its embeddings."""
    return make_llava(tmp_path_factory.mktemp("tied"), backbone="qwen2")


@pytest.mark.parametrize("layout", PREFIXES)
@pytest.mark.parametrize("brings", ["no-head", "both", "head-only"])
def test_a_tied_backbone_loads_alike_whichever_of_the_two_its_file_has(
    brings: str, layout: str, tied: Path, rewrite: Rewrite
) -> None:
    loaded = load(tied)
    assert not any("lm_head" in name for name in loaded)
    tensors = {f"model.{name}": tensor for name, tensor in loaded.items()}
    if brings != "no-head":
        tensors[HEAD] = tensors[EMBEDDINGS].clone()
    if brings == "head-only":
        del tensors[EMBEDDINGS]
    again = load(rewrite(tied, rename(tensors, layout)))
    assert again.keys() == loaded.keys()
    assert all(torch.equal(again[name], loaded[name]) for name in loaded)


def test_a_head_that_differs_from_the_embeddings_is_not_tied_as_in_transformers(
    tied: Path, rewrite: Rewrite
) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in load(tied).items()}
    tensors[HEAD] = tensors[EMBEDDINGS] + 1
    folder = rewrite(tied, tensors)
    again = load(folder)
    assert torch.equal(again["language_model.lm_head.weight"], tensors[HEAD])
    assert torch.equal(again["language_model.embed_tokens.weight"], tensors[EMBEDDINGS])
    theirs = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(theirs.lm_head.weight, tensors[HEAD])
    hidden = torch.ones(1, 64)
    for path, weight in ((folder, tensors[HEAD]), (tied, tensors[EMBEDDINGS])):
        logits = load_whole(path).compute_logits(hidden)
        torch.testing.assert_close(logits, hidden @ weight.T)


def test_a_tied_backbone_needs_one_of_the_two(tied: Path, rewrite: Rewrite) -> None:
    tensors = {f"model.{name}": tensor for name, tensor in load(tied).items()}
    del tensors[EMBEDDINGS]
    assert "language_model.embed_tokens.weight" in refused(rewrite(tied, tensors))


def test_a_missing_tensor_is_named(saved: Path, weights: Weights, rewrite: Rewrite) -> None:
    left = {name: tensor for name, tensor in weights.items() if name != DOWN}
    message = refused(rewrite(saved, left))
    assert "lacks 1 of the model's tensors, language_model.layers.1.mlp.down_proj.weight" in message


def test_a_missing_part_of_a_fused_layer_is_named(
    saved: Path, weights: Weights, rewrite: Rewrite
) -> None:
    gone = "model.language_model.layers.0.self_attn.k_proj.weight"
    left = {name: tensor for name, tensor in weights.items() if name != gone}
    assert "language_model.layers.0.self_attn.k_proj.weight" in refused(rewrite(saved, left))


def test_an_untied_backbone_needs_its_lm_head(
    saved: Path, weights: Weights, rewrite: Rewrite
) -> None:
    left = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    assert "language_model.lm_head.weight" in refused(rewrite(saved, left))


@pytest.mark.parametrize("name", [DOWN, "model.language_model.layers.0.self_attn.v_proj.weight"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(
    name: str, saved: Path, weights: Weights, rewrite: Rewrite
) -> None:
    rows, columns = weights[name].shape
    message = refused(rewrite(saved, weights | {name: torch.zeros(rows + 1, columns)}))
    assert f"{name} in the checkpoint: [{rows + 1}, {columns}]" in message
    assert f"[{rows}, {columns}]" in message


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda file: os.truncate(file, file.stat().st_size // 2), id="truncated"),
        pytest.param(lambda file: os.truncate(file, 5), id="header-truncated"),
        pytest.param(lambda file: os.truncate(file, 0), id="empty"),
        pytest.param(lambda file: file.write_bytes(bytes(range(256)) * 64), id="no-safetensors"),
    ],
)
def test_a_corrupt_shard_is_named(
    damage: Callable[[Path], None], saved: Path, weights: Weights, rewrite: Rewrite
) -> None:
    folder = rewrite(saved, weights, 3)
    damage(folder / "model-00002-of-00003.safetensors")
    message = refused(folder)
    assert "corrupt" in message and "model-00002-of-00003.safetensors" in message


def test_a_missing_shard_is_named(saved: Path, weights: Weights, rewrite: Rewrite) -> None:
    folder = rewrite(saved, weights, 3)
    (folder / "model-00003-of-00003.safetensors").unlink()
    assert "lacks model-00003-of-00003.safetensors" in refused(folder)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_named(
    text: str, saved: Path, weights: Weights, rewrite: Rewrite
) -> None:
    folder = rewrite(saved, weights, 2)
    (folder / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refused(folder)


def test_a_quantised_tensor_is_refused(saved: Path, weights: Weights, rewrite: Rewrite) -> None:
    folder = rewrite(saved, weights | {DOWN: weights[DOWN].to(torch.int8)})
    assert f"dtype of {DOWN} in the checkpoint is not supported: torch.int8" in refused(folder)


def test_without_safetensors_the_message_says_what_to_do(saved: Path, rewrite: Rewrite) -> None:
    folder = rewrite(saved, {"x": torch.zeros(1)})
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    assert "no *.safetensors file" in refused(folder)


def test_files_that_the_index_does_not_name_are_left_alone(
    saved: Path, weights: Weights, rewrite: Rewrite
) -> None:
    folder = rewrite(saved, weights, 2)
    (folder / "consolidated.safetensors").write_bytes(b"another format's copy")
    assert_as_transformers(load(folder), weights)


def test_dummy_weights_need_no_file_and_follow_the_seed(saved: Path, rewrite: Rewrite) -> None:
    folder = rewrite(saved, {"x": torch.zeros(1)})
    (folder / "model.safetensors").unlink()
    first, again, other = (load(folder, load_format="dummy", seed=seed) for seed in (3, 3, 4))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        assert tensor.isfinite().all(), name
        assert tensor.dim() == 1 or not torch.equal(tensor, other[name]), name
        if tensor.dim() > 1:
            assert 0.01 < float(tensor.std()) < 0.03, name


@pytest.mark.parametrize("drawn", [997, weights_module.DRAWN])
def test_dummy_weights_of_two_processes_are_pieces_of_the_whole_ones(
    saved: Path, monkeypatch: pytest.MonkeyPatch, drawn: int
) -> None:
    monkeypatch.setattr(weights_module, "DRAWN", drawn)
    config = EngineConfig(model=str(saved), load_format="dummy", dtype="float32", progress=False)

    def targets(shard: Shard) -> dict[str, Target]:
        opened = open_model(config, shard=shard)
        return weight_targets(load_model(opened, torch.device("cpu")).model)

    whole = targets(Shard())
    num_split = 0
    for rank in range(2):
        for name, target in targets(Shard(rank, 2)).items():
            piece, place = target.pieces(whole[name].tensor)
            assert torch.equal(piece, place), name
            num_split += list(place.shape) != target.shape
    assert num_split > 10


def test_dummy_weights_past_what_is_drawn_repeat_it_and_their_rows_differ(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights_module, "DRAWN", 997)
    down = load(saved, load_format="dummy")[DOWN.removeprefix("model.")]
    flat = down.flatten()
    assert len(flat) > 2 * 997
    assert torch.equal(flat[:-997], flat[997:])
    assert len(down.unique(dim=0)) == len(down)
