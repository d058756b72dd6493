"""Experts that checkpoints keep apart are joined as transformers joins them, or missed loudly."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlavaForConditionalGeneration
from transformers.core_model_loading import PrefixChange, WeightRenaming

from checkpoints import make_llava, text_config
from decoding import make_decoder, weights_of
from mm_engine.config import EngineConfig
from mm_engine.errors import StartupError
from mm_engine.models.joined_weights import JoinedWeights
from mm_engine.models.weights import WeightReport, load_into
from mm_engine.worker.loader import load_model, open_model

Rewrite = Callable[..., Path]
#: Twelve, so that the order by number isn't the order of names.
CHANGES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 12},
    "qwen3moe": {"num_experts": 12},
}


@pytest.fixture(scope="module", params=CHANGES)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with experts apart."""
    path = tmp_path_factory.mktemp("experts")
    return make_llava(path, backbone=request.param, text_changes=CHANGES[request.param])


def load(path: Path) -> Any:
    config = EngineConfig(model=str(path), dtype="float32", progress=False)
    return load_model(open_model(config), torch.device("cpu")).model


@pytest.mark.parametrize("num_shards", [1, 5], ids=["one-file", "sharded"])
def test_experts_are_joined_in_the_order_of_their_numbers(
    saved: Path, num_shards: int, rewrite: Rewrite
) -> None:
    apart = load_file(saved / "model.safetensors")
    assert any(".experts.11." in name for name in apart), "the checkpoint must keep them apart"
    reversed_order = dict(reversed(apart.items()))
    oracle = LlavaForConditionalGeneration.from_pretrained(saved, dtype=torch.float32)
    expected = oracle.model.language_model.state_dict()
    loaded = weights_of(load(rewrite(saved, reversed_order, num_shards)).language_model)
    joined = [name for name in loaded if name.endswith(("gate_up_proj", "down_proj"))]
    assert len(joined) == 4
    for name in joined:
        assert torch.equal(loaded[name], expected[name])
    # What is only renamed arrives too.
    assert torch.equal(loaded["layers.1.mlp.gate.weight"], expected["layers.1.mlp.gate.weight"])


@pytest.mark.parametrize(
    ("dropped", "message"),
    [
        (("layers.0.", ".experts.7.", "w3", "up_proj"), "don't fit: .*experts.*Fetch"),
        (("layers.0.", ".experts.7.", "w2", "down_proj"), "shape of .*experts.down_proj"),
        (("layers.0.", ".experts.", "w2", "down_proj"), "weights are missing: .*experts.down_proj"),
    ],
    ids=["half-of-one", "one", "all"],
)
def test_an_expert_that_no_file_has_is_missed(
    saved: Path, dropped: tuple[str, str, str, str], message: str, rewrite: Rewrite
) -> None:
    layer, expert, *parts = dropped
    kept = {
        name: tensor
        for name, tensor in load_file(saved / "model.safetensors").items()
        if not (layer in name and expert in name and any(part in name for part in parts))
    }
    with pytest.raises(StartupError, match=message):
        load(rewrite(saved, kept))


def test_prefixes_are_not_the_joiners_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """`weight_prefixes` renames; a rule that does it too would take names away from the rest."""
    rules = [PrefixChange(prefix_to_remove="layers"), WeightRenaming("strange", "familiar")]
    monkeypatch.setattr(
        "mm_engine.models.joined_weights.get_model_conversion_mapping", lambda *_, **__: rules
    )
    joiner = JoinedWeights(torch.nn.Module(), "model")
    assert joiner.renamings == rules[1:]
    tensor = torch.zeros(2)
    assert not joiner.hold("layers.0.weight", tensor)
    assert joiner.hold("layers.0.strange.weight", tensor)
    assert list(joiner.joined()) == [("layers.0.familiar.weight", tensor)]


def test_a_tensor_that_no_rule_knows_is_reported_as_unused() -> None:
    model = torch.nn.Module()
    model.language_model = make_decoder(text_config("mixtral"))
    names = {"language_model.layers.0.strange.weight": torch.zeros(2)}
    report: WeightReport = load_into(model, names.items(), {})
    assert report.unused == ["language_model.layers.0.strange.weight"]
