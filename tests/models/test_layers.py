"""Fused and packed linear layers compute what plain ones do."""

from __future__ import annotations

import pytest
import torch
from mm_engine_kernels import ops
from torch import Tensor, nn

from decoding import weights_of
from mm_engine.models.layers import Linear, pack_linears
from mm_engine.models.weights import load_into

needs_kernels = pytest.mark.skipif(
    ops.chosen("cpu").name != "cpp", reason="the C++ kernels aren't built: nothing is packed"
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused = Linear(24, {"first": 10, "second": 6}, bias=True)
        self.last = Linear(24, 5)


def make_layer(out: int | dict[str, int], *, bias: bool) -> Linear:
    layer, generator = Linear(64, out, bias=bias), torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        parameter.data.normal_(0.0, 0.2, generator=generator)
    return layer


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_parts_of_a_fused_layer_are_loaded_by_their_own_names() -> None:
    block = nn.ModuleDict({"block": Block()})
    weights = {name: noise(*tensor.shape) for name, tensor in weights_of(block).items()}
    assert sorted(weights) == [
        "block.first.bias",
        "block.first.weight",
        "block.last.weight",
        "block.second.bias",
        "block.second.weight",
    ]
    weights["block.second.weight"] += 1
    report = load_into(block, weights.items(), {})
    assert report.loaded == set(weights) and not report.missing and not report.unused
    x = noise(3, 24)
    expected = [
        nn.functional.linear(x, weights[f"block.{part}.weight"], weights[f"block.{part}.bias"])
        for part in ("first", "second")
    ]
    torch.testing.assert_close(block["block"].fused(x), torch.cat(expected, dim=-1))


def test_the_report_names_what_was_missing_and_what_was_not_used() -> None:
    block = nn.ModuleDict({"block": Block()})
    pairs = [("old.last.weight", noise(5, 24)), ("block.third.weight", noise(2))]
    report = load_into(block, pairs, {"old.": "block.", "block.": "never."})
    assert report.loaded == {"block.last.weight"}
    assert report.unused == ["block.third.weight"]
    assert "block.first.bias" in report.missing and "block.last.weight" not in report.missing


def test_buffers_of_a_checkpoint_are_loaded_and_others_keep_their_values() -> None:
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(3), "other": nn.BatchNorm1d(3)})
    model["norm"].register_buffer("table", torch.full((2,), 5.0), persistent=False)
    saved = {
        "norm.weight": noise(3),
        "norm.bias": noise(3),
        "norm.running_mean": noise(3),
        "norm.num_batches_tracked": torch.tensor(7),
        "norm.table": noise(2),
    }
    report = load_into(model, saved.items(), {})
    assert torch.equal(model["norm"].running_mean, saved["norm.running_mean"])
    assert int(model["norm"].num_batches_tracked) == 7
    assert model["norm"].running_var.tolist() == [1, 1, 1]
    assert model["norm"].table.tolist() == [5, 5] and report.unused == ["norm.table"]
    assert report.missing == ["other.bias", "other.weight"]


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("num_rows", [1, 7, 33])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "plain"])
def test_a_packed_layer_computes_what_the_plain_one_does(
    bias: bool, num_rows: int, dtype: torch.dtype
) -> None:
    layer = make_layer({"first": 40, "second": 23}, bias=bias).to(dtype)
    x = noise(num_rows, 64).to(dtype)
    with torch.inference_mode():
        plain = layer(x)
        layer.pack()
        packed = layer(x)
    assert layer.packed is not None
    assert packed.dtype == dtype and packed.shape == plain.shape
    step = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(packed, plain, rtol=step, atol=step)


@needs_kernels
def test_packing_gives_the_plain_weight_up() -> None:
    block = Block().bfloat16()
    pack_linears(block)
    assert block.fused.weight.numel() == 0 and block.last.weight.numel() == 0
    assert block.fused.packed is not None and block.last.packed is not None


@needs_kernels
def test_a_weight_that_others_use_keeps_its_memory() -> None:
    model = nn.ModuleList([Linear(8, 16), Linear(8, 16), Linear(8, 16), nn.Embedding(16, 8)])
    shared = model[3].weight
    shared.requires_grad_(False).copy_(noise(16, 8))
    model[0].weight, model[1].weight = shared, nn.Parameter(shared.data, requires_grad=False)
    before, x = shared.clone(), noise(3, 8)
    own = model[2].weight.data_ptr()
    pack_linears(model)
    assert torch.equal(model[3].weight, before)
    for layer in model[:2]:
        torch.testing.assert_close(layer(x), nn.functional.linear(x, before))
    assert model[2].packed is not None and model[2].packed.data.data_ptr() == own


@needs_kernels
def test_a_packed_weight_comes_back_to_be_loaded_into() -> None:
    block = Block()
    weights = {name: noise(*tensor.shape) for name, tensor in weights_of(block).items()}
    load_into(block, weights.items(), {})
    pack_linears(block)
    assert block.fused.packed is not None
    back = weights_of(block)
    assert block.fused.packed is None
    assert all(torch.equal(back[name], tensor) for name, tensor in weights.items())


def test_other_dtypes_stay_as_they_are() -> None:
    layer = make_layer(8, bias=False).half()
    before = layer.weight.clone()
    layer.pack()
    assert layer.packed is None and torch.equal(layer.weight, before)
