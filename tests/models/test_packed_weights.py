"""torch's layers in an encoder compute with packed weights what they did with plain ones."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from mm_engine_kernels import ops
from torch import Tensor, nn

from checkpoints import IMAGE_SIZE, TOWERS, vision_config
from decoding import weights_of
from mm_engine.models.layers import Linear
from mm_engine.models.packed_weights import PackedLinear, PackedPatches, PackedWeight, pack_encoders
from mm_engine.models.vision import build_vision_tower, tower_features
from mm_engine.models.weights import load_into

packs = ops.chosen("cpu").name == "cpp"
needs_kernels = pytest.mark.skipif(not packs, reason="the C++ kernels aren't built")
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.router, self.lm_head = nn.Linear(24, 4), Linear(24, 8)

    def untie(self) -> None:
        raise AssertionError


class Model(nn.Module):
    """An encoder of torch's layers, and a decoder that has one too."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 24, 4, 4)
        self.tower = nn.Sequential(nn.Linear(24, 50), nn.GELU(), nn.Linear(50, 24, bias=False))
        self.decoder = Decoder()

    def forward(self, pixels: Tensor) -> Tensor:
        made: Tensor = self.tower(self.patches(pixels).flatten(2).transpose(1, 2))
        return made


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def randomised(module: nn.Module) -> Any:
    for seed, parameter in enumerate(module.parameters()):
        parameter.data = noise(*parameter.shape, seed=seed).to(parameter.dtype) * 0.2
    return module.eval()


def assert_close(got: Tensor, wanted: Tensor) -> None:
    assert got.dtype == wanted.dtype and got.is_contiguous() == wanted.is_contiguous()
    step = 1e-5 if got.dtype == torch.float32 else 2e-2
    torch.testing.assert_close(got, wanted, rtol=step, atol=step)


@DTYPES
@pytest.mark.parametrize("kind", TOWERS)
def test_a_packed_tower_gives_transformers_features(kind: str, dtype: torch.dtype) -> None:
    """Which themselves are held to transformers' whole tower, in test_vision."""
    tower = randomised(build_vision_tower(vision_config(kind), [0, -2, -1])).to(dtype)
    pixels = noise(2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with torch.inference_mode():
        plain = tower_features(tower, pixels)
        pack_encoders(tower)
        packed = tower_features(tower, pixels)
    num = sum(isinstance(module, PackedWeight) for module in tower.modules())
    assert num >= 1 + 3 * 6 if packs else num == 0
    for got, wanted in zip(packed, plain, strict=True):
        step = 1e-5 if dtype == torch.float32 else 2e-2
        scale = float(wanted.abs().max())
        torch.testing.assert_close(got / scale, wanted / scale, rtol=step, atol=step)


@DTYPES
@pytest.mark.parametrize("shape", [(1, 4, 4), (2, 9, 14), (0, 8, 8)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_layer_of_patches(bias: bool, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    layer = randomised(nn.Conv2d(3, 20, (4, 2), (4, 2), bias=bias)).to(dtype)
    number, height, width = shape
    pixels = noise(number, 3, height, width).to(dtype)
    with torch.inference_mode():
        plain = layer(pixels)
        pack_encoders(layer)
        assert_close(layer(pixels), plain)
        assert_close(layer(pixels.to(memory_format=torch.channels_last)).contiguous(), plain)
        assert_close(layer(pixels.expand(3, *pixels.shape)[1]), plain)


@needs_kernels
@DTYPES
@pytest.mark.parametrize("shape", [(40,), (0, 40), (1, 40), (2, 9, 40)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_linear_layer(bias: bool, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = randomised(nn.Linear(40, 23, bias=bias)).to(dtype)
    x = noise(*shape).to(dtype)
    with torch.inference_mode():
        plain = layer(x)
        pack_encoders(layer)
        assert isinstance(layer, PackedLinear)
        assert_close(layer(x), plain)


@needs_kernels
def test_input_that_does_not_fit_fails_as_it_does_with_torch() -> None:
    model = randomised(Model())
    pack_encoders(model)
    assert isinstance(model.patches, PackedPatches)
    with pytest.raises(RuntimeError, match="dtype"):
        model.tower(noise(1, 24).bfloat16())
    with pytest.raises(RuntimeError, match="channels"):
        model.patches(noise(1, 2, 8, 8))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        model.patches(noise(1, 3, 2, 8))
    assert model.patches(noise(3, 8, 8)).shape == (24, 2, 2)  # no batch


@needs_kernels
def test_the_plain_weight_is_freed() -> None:
    model = randomised(Model())
    plain = [weakref.ref(layer.weight) for layer in (model.patches, model.tower[0])]
    pack_encoders(model)
    gc.collect()
    assert [weight() for weight in plain] == [None, None]
    assert model.patches._parameters["weight"].numel() == 0


@needs_kernels
def test_whoever_reads_a_packed_weight_gets_it_as_it_was() -> None:
    model = randomised(Model()).bfloat16()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pack_encoders(model)
    assert {type(model.patches), type(model.tower[2])} == {PackedPatches, PackedLinear}
    assert model.state_dict().keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(model.get_parameter(name), tensor)
        assert torch.equal(model.state_dict()[name], tensor)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@needs_kernels
@pytest.mark.parametrize("way", ["load_into", "load_state_dict", "to"])
def test_a_packed_model_is_loaded_into_or_converted_and_packed_again(way: str) -> None:
    model, other = randomised(Model()), Model()
    pixels = noise(1, 3, 8, 8)
    weights = {name: 0.2 * noise(*t.shape, seed=7) for name, t in weights_of(other).items()}
    load_into(other, weights.items(), {})
    pack_encoders(model)
    with torch.inference_mode():
        if way == "load_into":
            report = load_into(model, weights.items(), {})
            assert not report.missing and not report.unused
        elif way == "load_state_dict":
            model.load_state_dict(weights)
        else:
            assert model.bfloat16()(pixels.bfloat16()).dtype == torch.bfloat16
            load_into(model.to(torch.float32), weights.items(), {})
        wanted = other(pixels)
        assert type(model.patches) is nn.Conv2d and type(model.tower[0]) is nn.Linear
        assert torch.equal(model(pixels), wanted)
        pack_encoders(model)
        assert type(model.tower[0]) is PackedLinear
        assert_close(model(pixels), wanted)


@needs_kernels
def test_hooks_stay_on_a_packed_layer() -> None:
    model, seen = randomised(Model()), []
    model.tower[0].register_forward_hook(lambda *call: seen.append(call[0]))
    pack_encoders(model)
    model(noise(1, 3, 8, 8))
    assert seen == [model.tower[0]]


def test_some_layers_stay_as_they_are() -> None:
    model = randomised(Model())
    shared, apart = nn.Linear(8, 8), nn.Linear(8, 8)
    shared.weight = apart.weight
    upper, lower = nn.Linear(8, 8), nn.Linear(8, 8)  # two halves of one tensor
    upper.weight, lower.weight = (nn.Parameter(half) for half in torch.randn(16, 8).chunk(2))
    own = nn.Linear(8, 8)
    own.forward = lambda x: x  # type: ignore[method-assign]
    empty = nn.Linear(1, 8)
    empty.weight = nn.Parameter(torch.empty(8, 0))
    others = [
        *(shared, apart, upper, lower, own),
        nn.Linear(8, 8).half(),
        empty,
        nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)),
        nn.Conv2d(3, 8, 4, 2),
        nn.Conv2d(3, 8, 4, 4, padding=1),
        nn.Conv2d(4, 8, 4, 4, groups=2),
        nn.Conv2d(3, 8, 2, 2, dilation=2),
        nn.MultiheadAttention(8, 2),
        nn.TransformerEncoderLayer(8, 2, 16),
    ]
    model.others = nn.ModuleList(others)
    before = [type(module) for module in model.others.modules()]
    pack_encoders(model)
    assert [type(module) for module in model.others.modules()] == before
    assert type(model.decoder.router) is nn.Linear and model.decoder.lm_head.packed is None
