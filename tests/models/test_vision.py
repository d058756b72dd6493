"""A tower gives transformers' hidden states and holds no layer past those that are read."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from mm_engine_kernels import ops
from torch import nn
from transformers import AttentionInterface, AutoConfig, AutoModel

from checkpoints import IMAGE_SIZE, TOWERS, vision_config
from mm_engine.errors import StartupError
from mm_engine.models import encoder_attention
from mm_engine.models.encoder_attention import IMPLEMENTATION
from mm_engine.models.vision import (
    build_vision_tower,
    num_tower_rows,
    resolve_layers,
    select_features,
    tower_features,
)

LAYERS: list[int | list[int]] = [0, 1, -1, -2, 3, [0, -2], [-1, 1], [-3, -1, 2]]


def randomise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.1, 0.3, generator=generator)


def full_tower(kind: str) -> Any:
    tower = AutoModel.from_config(vision_config(kind), attn_implementation="sdpa").eval()
    randomise(tower)
    return tower


@pytest.mark.parametrize("layers", LAYERS, ids=str)
@pytest.mark.parametrize("kind", TOWERS)
def test_features_are_transformers_hidden_states(kind: str, layers: int | list[int]) -> None:
    full = full_tower(kind)
    trimmed: Any = build_vision_tower(vision_config(kind), layers)
    missing, _ = trimmed.load_state_dict(full.state_dict(), strict=False)
    assert not missing
    pixels = torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        states = full(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 4
    picked = [layers] if isinstance(layers, int) else layers
    got = tower_features(trimmed, pixels)
    assert len(got) == len(picked)
    for layer, features in zip(picked, got, strict=True):
        torch.testing.assert_close(features, states[layer], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", TOWERS)
def test_attention_is_our_kernels(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    real = ops.full_attention

    def counted(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        calls.append(tuple(query.shape))
        return real(query, *rest)

    monkeypatch.setattr(ops, "full_attention", counted)
    tower: Any = build_vision_tower(vision_config(kind), -1)
    randomise(tower)
    tower_features(tower, torch.randn(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert len(calls) == 3 and {shape[0] for shape in calls} == {2}


def test_what_the_kernel_does_not_do_is_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask, causal attention and what else is asked for by name."""
    attend, torchs = AttentionInterface()[IMPLEMENTATION], AttentionInterface()["sdpa"]
    calls: list[dict[str, Any]] = []

    def watched(*args: Any, **keywords: Any) -> Any:
        calls.append(keywords)
        return torchs(*args, **keywords)

    monkeypatch.setattr(encoder_attention, "sdpa_attention_forward", watched)
    knows_biases = "position_bias" in inspect.signature(torchs).parameters  # older ones: no model
    module = nn.Identity()
    module.is_causal = False
    query, key, value = torch.randn(3, 1, 2, 5, 16).unbind(0)
    hidden = torch.rand(1, 1, 5, 5) > 0.5
    hidden |= torch.eye(5, dtype=torch.bool)
    bias = torch.randn(1, 2, 5, 5)
    plain = attend(module, query, key, value, None)[0]
    for mask, asked in ((hidden, {}), (None, {"is_causal": True}), (None, {"position_bias": bias})):
        got = attend(module, query, key, value, mask, **asked)[0]
        torch.testing.assert_close(got, torchs(module, query, key, value, mask, **asked)[0])
        assert all(calls[-1][name] is given for name, given in asked.items())
        assert torch.allclose(got, plain) == ("position_bias" in asked and not knows_biases)
    assert len(calls) == 3  # the plain one is the kernel's
    torch.testing.assert_close(plain, torchs(module, query, key, value, None)[0])


@pytest.mark.parametrize(
    ("layers", "depth"), [(0, 0), (1, 1), (-2, 2), (-1, 3), ([0, 1], 1)], ids=str
)
@pytest.mark.parametrize("kind", TOWERS)
def test_the_tower_ends_with_the_last_layer_that_is_read(
    kind: str, layers: int | list[int], depth: int
) -> None:
    config = vision_config(kind)
    tower: Any = build_vision_tower(config, layers)
    assert len(tower.encoder.layers) == depth
    assert config.num_hidden_layers == 3  # the caller's config stays as it is
    names = [name for name, _ in tower.named_parameters()]
    assert names and not any("post_layernorm" in name or "head." in name for name in names)
    assert not tower.training
    assert not any(parameter.requires_grad for parameter in tower.parameters())


def test_pixels_take_the_dtype_of_the_tower() -> None:
    tower: Any = build_vision_tower(vision_config("clip"), -2).bfloat16()
    randomise(tower)
    (features,) = tower_features(tower, torch.zeros(1, 3, IMAGE_SIZE, IMAGE_SIZE))
    assert features.dtype == torch.bfloat16 and features.isfinite().all()


@pytest.mark.parametrize("layer", [4, -5, [0, 4], 99])
def test_a_layer_out_of_range_is_refused(layer: int | list[int]) -> None:
    with pytest.raises(StartupError, match="out of range: -?[0-9]+ of a tower with 4 hidden"):
        build_vision_tower(vision_config("clip"), layer)


def test_layers_count_from_either_end() -> None:
    assert resolve_layers(vision_config("clip"), [0, 3, -1, -4, -2]) == [0, 3, 3, 0, 2]


@pytest.mark.parametrize("layers", [-2, [-2, 1]], ids=str)
@pytest.mark.parametrize("strategy", ["default", "full"])
@pytest.mark.parametrize("kind", TOWERS)
def test_rows_are_counted_as_the_projector_gets_them(
    kind: str, strategy: str, layers: int | list[int]
) -> None:
    config = vision_config(kind)
    tower: Any = build_vision_tower(config, layers)
    randomise(tower)
    states = tower_features(tower, torch.zeros(2, 3, IMAGE_SIZE, IMAGE_SIZE))
    features = select_features(states, strategy)
    width = config.hidden_size * len(states)
    assert features.shape == (2, num_tower_rows(config, strategy), width)
    dropped = int(strategy == "default")
    for i, state in enumerate(states):
        part = features[..., i * config.hidden_size : (i + 1) * config.hidden_size]
        assert torch.equal(part, state[:, dropped:])


@pytest.mark.parametrize("layers", [-1, -2, 1, [-2, -1]], ids=str)
@pytest.mark.parametrize("kind", ["dinov2", "vit", "internvl_vision"])
def test_a_tower_of_another_type_is_read_without_its_final_norm(
    kind: str, layers: int | list[int]
) -> None:
    """These end in norms of other names, which no hidden state passes through."""
    config = AutoConfig.for_model(
        kind,
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[16, 16] if kind == "internvl_vision" else 16,
        patch_size=[8, 8] if kind == "internvl_vision" else 8,
        **({"use_mean_pooling": False} if kind == "internvl_vision" else {}),
    )
    tower: Any = build_vision_tower(config, layers)
    randomise(tower)
    pixels = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    seen: list[Any] = []
    blocks = next(module for module in tower.modules() if isinstance(module, nn.ModuleList))
    hooks = [block.register_forward_hook(lambda m, a, out: seen.append(out)) for block in blocks]
    got = tower_features(tower, pixels)
    for hook in hooks:
        hook.remove()
    outputs = [out[0] if isinstance(out, tuple) else out for out in seen]
    wanted = resolve_layers(config, layers)
    for layer, features in zip(wanted, got, strict=True):
        torch.testing.assert_close(features, outputs[layer - 1])
    with pytest.raises(StartupError, match=f"{kind}. Count them in the plugin"):
        num_tower_rows(config, "full")
