"""Quantised layers: kernels against their plain meaning, that against the exact one; loading."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator

import pytest
import torch
from mm_engine_kernels import ops, quantized
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef

from mm_engine.errors import StartupError
from mm_engine.models import quantization_schemes
from mm_engine.models.layers import Linear, pack_linears
from mm_engine.models.quantization import Quantization
from mm_engine.models.quantization_schemes import (
    SCHEMES,
    CpuInt4,
    CudaFp8,
    CudaInt4,
    Fp8,
    Int4,
    Int8,
    PackedInt8,
    ScaledMMFp8,
    Scheme,
    make_scheme,
)
from mm_engine.models.weights import fill_random, load_into, weight_targets

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PAIRS = [(ScaledMMFp8, Fp8), (PackedInt8, Int8), (CpuInt4, Int4)]
NAMES = ("fp8", "int8", "int4")


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounding(plain: Scheme, x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square error that the scheme's rounding alone makes, for each output `[M, N]`.

    A number rounded to steps of s is off by s / sqrt(12), and errors of a sum add up in squares.
    """

    def fp8_steps(rows: Tensor) -> Tensor:
        scale = rows.abs().amax(-1, keepdim=True) / 448
        exponent = (rows / scale).abs().clamp(min=2.0**-6).log2().floor()
        return torch.exp2(exponent - 3) * scale

    if isinstance(plain, Fp8):
        squares = x.pow(2) @ fp8_steps(weight).pow(2).t()
        squares += fp8_steps(x).pow(2) @ weight.pow(2).t()
    elif isinstance(plain, Int8):
        steps = (weight.abs().amax(1, keepdim=True) / 127).expand_as(weight)
        squares = x.pow(2) @ steps.pow(2).t()
    else:
        grouped = weight.unflatten(1, (-1, quantization_schemes.group_of(weight.shape[1])))
        steps = ((grouped.amax(-1) - grouped.amin(-1)) / 15).repeat_interleave(grouped.shape[2], 1)
        squares = x.pow(2) @ steps.pow(2).t()
    return (squares / 12).sqrt()


@pytest.mark.parametrize("columns", [96, 160, 192, 384])
@pytest.mark.parametrize("scheme", [kind for pair in PAIRS for kind in pair])
def test_the_error_is_that_of_rounding(scheme: type[Fp8 | Int8 | Int4], columns: int) -> None:
    """A wrong scale, a swapped nibble or another group's zero point is off by far more."""
    # Rows and groups differ in size, so that no scale can stand for another.
    sizes = torch.logspace(-1, 1, columns // 32).repeat_interleave(32)
    weight, x = noise(48, columns) * sizes * torch.logspace(-2, 0, 48)[:, None], noise(64, columns)
    layer = scheme(CPU)
    got = layer.linear(x, layer.quantize(weight), None)
    error = (got - x @ weight.t()) / rounding(layer, x, weight)
    assert 0.85 < error.pow(2).mean().sqrt() < 1.15
    assert error.abs().max() < 6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [0, 1, 3, 16, 17, 40])
@pytest.mark.parametrize("columns", [96, 128, 160, 320])
@pytest.mark.parametrize(("kernel", "plain"), PAIRS, ids=NAMES)
def test_a_kernel_computes_what_its_plain_meaning_says(
    kernel: type[Scheme], plain: type[Scheme], columns: int, rows: int, dtype: torch.dtype
) -> None:
    weight, x = noise(48, columns).to(dtype), noise(rows, columns, seed=1).to(dtype)
    ours, other = kernel(CPU), plain(CPU)
    got, expected = (s.linear(x, s.quantize(weight), None) for s in (ours, other))
    assert got.dtype == dtype and got.shape == (rows, 48)
    # What is rounded in between differs: the widened weight in one, nothing in the other.
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * columns**0.5)


@pytest.mark.parametrize("kind", [Fp8, Int8, Int4, CpuInt4], ids=lambda kind: kind.__name__)
def test_slabs_make_what_the_whole_makes(
    kind: type[Scheme], monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, weight = kind(CPU), noise(48, 96).bfloat16()
    whole = scheme.quantize(weight)
    monkeypatch.setattr(quantization_schemes, "MAX_SLAB", 5 * 96 + 1)
    for part, expected in zip(scheme.quantize(weight), whole, strict=True):
        assert torch.equal(part.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize("kind", [ScaledMMFp8, Fp8, Int8])
@pytest.mark.parametrize(("rows", "columns"), [(5, 33), (1, 1), (7, 40)])
def test_awkward_sizes(kind: type[Scheme], rows: int, columns: int) -> None:
    scheme, weight, x = kind(CPU), noise(rows, columns), noise(3, columns, seed=1)
    assert scheme.refusal(rows, columns) is None
    got = scheme.linear(x, scheme.quantize(weight), None)
    expected = x @ weight.t()
    assert (got - expected).abs().max() <= 0.15 * (x.abs() @ weight.abs().t()).max()


def test_a_slice_that_no_vector_is_aligned_to() -> None:
    """PyTorch's int8 kernel would end the process."""
    scheme = PackedInt8(CPU)
    packed = scheme.quantize(noise(16, 32).bfloat16())
    whole = noise(3 * 32 + 1).bfloat16()
    x = whole[1:].view(3, 32)
    torch.testing.assert_close(
        scheme.linear(x, packed, None), scheme.linear(x.clone(), packed, None)
    )


@pytest.mark.parametrize(
    ("kind", "rows", "columns", "reason"),
    [
        (PackedInt8, 48, 40, "40 inputs aren't a multiple of 16"),
        (CpuInt4, 48, 48, "48 inputs aren't a multiple of 32"),
        (CpuInt4, 40, 64, "40 outputs aren't a multiple of 16"),
        (CudaInt4, 40, 64, None),
        (CudaInt4, 44, 64, "44 outputs aren't a multiple of 8"),
        (CudaFp8, 48, 40, "40 inputs aren't a multiple of 16"),
        (CudaFp8, 40, 48, "40 outputs aren't a multiple of 16"),
    ],
)
def test_sizes_that_a_kernel_does_not_take(
    kind: type[Scheme], rows: int, columns: int, reason: str | None
) -> None:
    assert kind(CPU).refusal(rows, columns) == reason


@pytest.mark.parametrize(("columns", "tiles", "group"), [(256, 8, 128), (192, 4, 64), (96, 2, 32)])
def test_layout_that_the_cards_int4_kernel_is_given(columns: int, tiles: int, group: int) -> None:
    """By PyTorch's own checks of shapes and dtypes, which need no card."""
    scheme, dtype = CudaInt4(CPU), torch.float16
    with FakeTensorMode():
        packed, scales = scheme.quantize(torch.empty(48, columns, dtype=dtype))
        out = scheme.linear(torch.empty(3, columns, dtype=dtype), (packed, scales), None)
    assert packed.shape == (6, columns // (16 * tiles), 32, tiles // 2)
    assert scales.shape == (columns // group, 48, 2) and scales.dtype == torch.bfloat16
    assert out.shape == (3, 48) and out.dtype == dtype


def test_what_the_cards_fp8_kernel_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[tuple[Tensor, ...]] = []
    multiply = torch._scaled_mm

    def watched(*args: Tensor, out_dtype: torch.dtype) -> Tensor:
        given.append(args)
        assert out_dtype == torch.bfloat16  # what the card's kernel writes
        with FakeTensorMode():  # PyTorch's own checks, which need no card
            fakes = [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda") for t in args
            ]
            assert multiply(*fakes, out_dtype=out_dtype).shape == (3, 48)
        rows, columns, row_scale, column_scale = (t.float() for t in args)
        return ((rows * row_scale) @ (columns * column_scale)).to(out_dtype)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    scheme, weight, x = CudaFp8(CPU), noise(48, 64).half(), noise(3, 64, seed=1).half()
    out = scheme.linear(x, scheme.quantize(weight), None)
    assert out.dtype == torch.float16
    torch.testing.assert_close(
        out, Fp8(CPU).linear(x, scheme.quantize(weight), None), rtol=1e-2, atol=0.1
    )
    ((rows, columns, row_scale, column_scale),) = given
    assert rows.dtype == columns.dtype == quantized.FP8
    assert rows.is_contiguous() and columns.stride() == (1, 64)  # row-major by column-major
    assert row_scale.shape == (3, 1) and column_scale.shape == (1, 48)
    assert row_scale.dtype == column_scale.dtype == torch.float32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fused = Linear(64, {"first": 32, "second": 16}, bias=True)
        self.odd = Linear(40, 64)


class TextBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.lm_head = Linear(64, 96)

    def untie(self) -> None: ...


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.language_model = TextBackbone()
        self.projector = Linear(64, 64)


@pytest.fixture
def model() -> Model:
    made = Model()
    fill_random(made, 0)
    return made


def names_of(model: Model) -> dict[str, Tensor]:
    targets = weight_targets(model).items()
    return {name: target.tensor.clone() for name, target in targets}


@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_quantised_as_soon_as_its_weight_is_whole(
    name: str, model: Model, caplog: pytest.LogCaptureFixture
) -> None:
    scheme = make_scheme(name, CPU, torch.float32)
    assert scheme is not None
    quantization, layers = Quantization(model, scheme), model.language_model.layers
    saved = names_of(model)
    first = [f"language_model.layers.0.{part}" for part in ("second.weight", "first.weight")]
    plain = StorageWeakRef(layers[0].fused.weight.untyped_storage())
    order = [*first, *(name for name in saved if name not in first)]

    def weights() -> Iterator[tuple[str, Tensor]]:
        for i, key in enumerate(order):
            assert bool(layers[0].fused.quantized) == (i >= 2)
            assert len(layers[0].fused.weight) == (48 if i < 2 else 0)
            if i != 2:  # the tensor that was copied to last is held until the next has come
                assert plain.expired() == (i > 2)
            yield key, saved[key]

    report = load_into(model, weights(), {})
    assert report.loaded == set(saved) and not report.missing and not report.unused
    assert all(block.fused.quantized for block in layers)
    own = ops.chosen("cpu").name == "cpp" and name != "fp8"  # our own take any width, and heads
    assert not model.projector.quantized
    assert bool(model.language_model.lm_head.quantized) == own
    assert torch.equal(model.projector.weight, saved["projector.weight"])
    with caplog.at_level(logging.INFO):
        quantization.finish(progress=False)
    kept = 0 if own or name == "fp8" else 2
    head = " (the head to int8)" if own and name == "int4" else ""
    assert f"Quantised {4 - kept + own} linear layers to {name}{head}: " in caplog.text
    assert ("2 stay as they are (40 inputs aren't a multiple of" in caplog.text) == bool(kept)
    x, prefix = noise(2, 3, 64), "language_model.layers.0."
    expected = nn.functional.linear(
        x,
        torch.cat([saved[f"{prefix}{part}.weight"] for part in ("first", "second")]),
        torch.cat([saved[f"{prefix}{part}.bias"] for part in ("first", "second")]),
    )
    got = layers[0].fused(x)
    assert got.shape == expected.shape
    assert (got - expected).abs().max() < 0.4 * expected.std()
    pack_linears(model)  # what comes after loading leaves it be
    assert torch.equal(layers[0].fused(x), got)


def test_biases_that_come_after_the_weight_count(model: Model) -> None:
    Quantization(model, Int8(CPU))
    saved = names_of(model)
    saved["language_model.layers.0.second.bias"] = torch.arange(16.0)
    late = sorted(saved.items(), key=lambda pair: pair[0].endswith("bias"))
    assert not load_into(model, late, {}).missing
    out = model.language_model.layers[0].fused(torch.zeros(1, 64))
    assert out[0].tolist() == [0.0] * 32 + list(range(16))


def test_what_no_checkpoint_brought_is_quantised_at_the_end(
    model: Model, capsys: pytest.CaptureFixture[str]
) -> None:
    quantization = Quantization(model, Int8(CPU))
    quantization.finish(progress=True)
    assert all(
        block.fused.quantized and block.odd.quantized for block in model.language_model.layers
    )
    assert "Quantising weights" in capsys.readouterr().err


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(model: Model, bad: float) -> None:
    Quantization(model, Int4(CPU))
    saved = names_of(model)
    saved["language_model.layers.1.second.weight"][3, 4] = bad
    with pytest.raises(StartupError, match="infinity.*: language_model.layers.1.second.weight. F"):
        load_into(model, saved.items(), {})


def test_a_model_that_nothing_fits_is_refused() -> None:
    model = Model()
    model.language_model.layers = nn.ModuleList([Linear(40, 40)])
    with pytest.raises(StartupError, match="no layer of Model .* int4: 40 inputs aren't"):
        Quantization(model, CpuInt4(CPU))
    with pytest.raises(StartupError, match="no layer of Sequential .* isn't built of our layers"):
        Quantization(nn.Sequential(Linear(64, 64)), CpuInt4(CPU))


@pytest.mark.parametrize(
    ("name", "capability", "remedy"),
    [("fp8", (8, 6), "int4 or int8"), ("fp8", (7, 5), "int8"), ("int4", (7, 5), "int8")],
)
def test_a_card_that_is_too_old_is_refused(
    name: str, capability: tuple[int, int], remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Old Card")
    fact = f"Old Card has compute capability {capability[0]}.{capability[1]}, and {name} needs"
    with pytest.raises(StartupError, match=f"{fact}.* Use --quantization {remedy}, or none"):
        make_scheme(name, torch.device("cuda"), torch.bfloat16)


def test_a_build_of_pytorch_without_the_kernel_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken(Fp8):
        def product(self, x: Tensor, packed: tuple[Tensor, ...]) -> Tensor:
            raise RuntimeError("not available for build\nframes")

    monkeypatch.setitem(SCHEMES, ("fp8", "cpu"), (Broken, (0, 0)))
    with pytest.raises(
        StartupError, match="can't compute fp8 on cpu: .* not available for build U"
    ):
        make_scheme("fp8", CPU, torch.bfloat16)
