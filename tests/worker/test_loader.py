"""Options and checkpoint together decide dtype, device and length."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from mm_engine_kernels import ops
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlavaConfig

from checkpoints import make_llava, text_config, vision_config
from mm_engine.config import EngineConfig
from mm_engine.errors import PluginError, StartupError
from mm_engine.models.layers import Linear
from mm_engine.models.packed_weights import PackedWeight
from mm_engine.models.weights import does_not_fit
from mm_engine.worker.loader import (
    load_model,
    open_model,
    pick_device,
    pick_dtype,
    pick_max_model_len,
)

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in bfloat16."""
    return make_llava(tmp_path_factory.mktemp("saved"), dtype=torch.bfloat16)


def options(**changes: Any) -> EngineConfig:
    return EngineConfig(**{"model": "m", "device": "cpu", "progress": False, **changes})


def hf_config(dtype: torch.dtype | None = None, *, nested: torch.dtype | None = None) -> Any:
    text = text_config("llama", dtype=nested)
    return LlavaConfig(text_config=text, vision_config=vision_config("clip"), dtype=dtype)


@pytest.mark.parametrize(
    ("own", "nested", "picked"),
    [
        (torch.float32, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float16, None, torch.bfloat16),  # few CPUs compute in float16
        (None, torch.float32, torch.float32),
        (None, torch.float16, torch.bfloat16),
        (None, None, torch.bfloat16),
        (torch.float64, None, torch.bfloat16),
        (torch.float32, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_auto_is_the_checkpoints_dtype_if_a_cpu_computes_in_it(
    own: torch.dtype | None, nested: torch.dtype | None, picked: torch.dtype
) -> None:
    assert pick_dtype(options(), hf_config(own, nested=nested)) == picked


@pytest.mark.parametrize("name", ["float32", "bfloat16", "float16"])
def test_a_dtype_asked_for_wins(name: str) -> None:
    picked = pick_dtype(options(dtype=name), hf_config(torch.bfloat16))
    assert picked == getattr(torch, name)


def old_card(patch: pytest.MonkeyPatch) -> None:
    """Two cards, of which the second doesn't compute in bfloat16."""
    patch.setattr(torch.cuda, "is_available", lambda: True)
    patch.setattr(torch.cuda, "device_count", lambda: 2)
    patch.setattr(torch.cuda, "set_device", lambda index: None)
    patch.setattr(torch.cuda, "get_device_capability", lambda index: ((8, 0), (7, 5))[index])
    patch.setattr(torch.cuda, "get_device_name", lambda index: ("new", "Tesla T4")[index])


def test_a_card_without_bfloat16_computes_in_float16_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    old_card(monkeypatch)
    model, both = hf_config(torch.bfloat16), {"tensor_parallel_size": 2}
    assert pick_dtype(options(device="auto"), model, says=True) == torch.bfloat16
    assert pick_dtype(options(device="cpu", **both), model, says=True) == torch.bfloat16
    own = hf_config(torch.float32)
    assert pick_dtype(options(device="auto", **both), own, says=True) == torch.float32
    assert pick_dtype(options(device="auto", **both), model) == torch.float16
    assert not caplog.records
    for own in (torch.bfloat16, None):
        picked = pick_dtype(options(device="cuda", **both), hf_config(own), says=True)
        assert picked == torch.float16
    said = (
        "Computing in float16 instead of bfloat16: Tesla T4 has compute capability 7.5, and "
        "bfloat16 takes 8.0."
    )
    assert [record.getMessage() for record in caplog.records] == [said] * 2


def test_bfloat16_asked_for_on_a_card_without_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old_card(monkeypatch)
    config = options(device="cuda", dtype="bfloat16", tensor_parallel_size=2)
    with pytest.raises(StartupError, match=r"bfloat16. Tesla T4 has .* 7.5,.*: --dtype float16."):
        pick_dtype(config, hf_config())
    assert pick_dtype(replace(config, tensor_parallel_size=1), hf_config()) == torch.bfloat16
    assert pick_dtype(replace(config, device="cpu"), hf_config()) == torch.bfloat16


def test_a_dtype_that_is_not_known_is_refused() -> None:
    with pytest.raises(StartupError, match="dtype is not known: int8. Use auto, float32"):
        pick_dtype(options(dtype="int8"), hf_config())


def test_auto_device_is_cuda_where_there_is_one() -> None:
    wanted = "cuda" if torch.cuda.is_available() else "cpu"
    assert pick_device(options(device="auto")).type == wanted
    assert pick_device(options(device="cpu")).type == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(StartupError, match="device is not available: cuda. Use --device cpu"):
        pick_device(options(device="cuda"))


def test_a_device_that_is_not_known_is_refused() -> None:
    with pytest.raises(StartupError, match="device is not known: tpu. Use auto, cpu or cuda"):
        pick_device(options(device="tpu"))


def test_the_length_is_the_models_or_less() -> None:
    config = hf_config()  # 512 positions
    assert pick_max_model_len(options(), config) == 512
    assert pick_max_model_len(options(max_model_len=512), config) == 512
    assert pick_max_model_len(options(max_model_len=1), config) == 1


@pytest.mark.parametrize("length", [0, -1, 513])
def test_a_length_that_the_model_has_no_positions_for_is_refused(length: int) -> None:
    with pytest.raises(StartupError, match=f"out of range: {length}. .* from 1 to 512 tokens"):
        pick_max_model_len(options(max_model_len=length), hf_config())


def test_an_opened_model_says_what_was_chosen(saved: Path) -> None:
    opened = open_model(options(model=str(saved), max_model_len=100))
    assert opened.ctx.architecture == "LlavaForConditionalGeneration"
    assert opened.ctx.dtype == torch.bfloat16
    assert opened.ctx.max_model_len == 100
    assert opened.ctx.limits == {"image": 8}
    assert opened.eos_token_ids == (2,)
    assert opened.plugin.record.distribution == "mm-llava"


def test_limits_asked_for_are_the_contexts(saved: Path) -> None:
    opened = open_model(options(model=str(saved), limit_mm_per_prompt={"image": 2}))
    assert opened.ctx.limits == {"image": 2}


@pytest.mark.parametrize("name", ["float32", "bfloat16"])
def test_the_model_is_built_in_the_dtype_and_leaves_pytorchs_default(
    name: str, saved: Path
) -> None:
    config = options(model=str(saved), dtype=name)
    loaded = load_model(open_model(config), CPU)
    assert {p.dtype for p in loaded.model.parameters()} == {getattr(torch, name)}
    assert torch.get_default_dtype() == torch.float32
    assert not loaded.model.training
    assert loaded.seconds > 0


def test_parameters_are_counted_before_packing(saved: Path, request: pytest.FixtureRequest) -> None:
    packed = load_model(open_model(options(model=str(saved))), CPU)
    request.getfixturevalue("reference_kernels")
    plain = load_model(open_model(options(model=str(saved))), CPU)
    assert plain.num_parameters == sum(p.numel() for p in plain.model.parameters())
    assert packed.num_parameters == plain.num_parameters


@pytest.mark.skipif(
    ops.chosen("cpu").name != "cpp", reason="the C++ kernels aren't built: nothing is packed"
)
def test_layers_are_packed_once_loaded(saved: Path) -> None:
    model = load_model(open_model(options(model=str(saved), dtype="bfloat16")), CPU).model
    linears = [module for module in model.modules() if isinstance(module, Linear)]
    assert len(linears) == 9
    assert all(layer.packed is not None for layer in linears)
    encoder = [*model.vision_tower.modules(), *model.multi_modal_projector.modules()]
    plain = [module for module in encoder if type(module) in (nn.Linear, nn.Conv2d)]
    assert not plain and sum(isinstance(module, PackedWeight) for module in encoder) == 15


def test_a_load_format_that_is_not_known_is_refused(saved: Path) -> None:
    opened = open_model(options(model=str(saved), load_format="gguf"))
    with pytest.raises(StartupError, match="load format is not known: gguf. Use auto or dummy"):
        load_model(opened, CPU)


ONE_FILE = """
from mm_engine.plugins import hookimpl
from torch import nn
architectures = ["LlavaForConditionalGeneration"]

class Model(nn.Module):
    def __init__(self, ctx):
        super().__init__()
        {body}

@hookimpl
def model_class(ctx):
    return Model

@hookimpl
def max_tokens(ctx, modality):
    return 4
"""


@pytest.mark.parametrize(
    ("body", "fact"),
    [
        ("raise ValueError('no such layer')", r"Model\(ctx\) raised ValueError: no such layer"),
        ("pass", "expected an nn.Module with SupportsVision, got Model"),
    ],
    ids=["raises", "no-mixin"],
)
def test_a_class_that_can_not_be_served_is_blamed_on_its_plugin(
    body: str, fact: str, saved: Path, tmp_path: Path
) -> None:
    file = tmp_path / "my_model.py"
    file.write_text(ONE_FILE.format(body=body))
    opened = open_model(options(model=str(saved), plugins=(str(file),)))
    assert issubclass(opened.plugin.model_class(opened.ctx), nn.Module)
    with pytest.raises(PluginError, match=r"my_model\.py.* · model_class .*" + fact):
        load_model(opened, CPU)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("own", [0, -1, 1.5, "512"])
def test_a_model_without_positions_is_refused(own: Any) -> None:
    config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=own))
    for length in (None, 1):
        with pytest.raises(StartupError, match=f"^max_position_embeddings must be .*: {own!r}. "):
            pick_max_model_len(options(max_model_len=length), config)


@pytest.mark.parametrize("backbone", ["llama", "qwen3"])
@pytest.mark.parametrize("hidden_size", [10**8, 10**12])
def test_a_model_that_does_not_fit_in_memory_is_not_the_plugins_fault(
    backbone: str, hidden_size: int, tmp_path: Path
) -> None:
    path = make_llava(tmp_path, backbone=backbone)
    fields = json.loads((path / "config.json").read_text())
    fields["text_config"]["hidden_size"] = hidden_size
    (path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(StartupError, match="^the model doesn't fit in memory: ") as caught:
        load_model(open_model(options(model=str(path))), CPU)
    assert "mm-llava" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "memory"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("DefaultCPUAllocator"), False),
    ],
    ids=repr,
)
def test_errors_of_memory_are_told_from_others(error: BaseException, memory: bool) -> None:
    assert does_not_fit(error) == memory


def test_missing_weights_are_named_beside_those_that_nothing_took(
    saved: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(saved, tmp_path / "copy")
    tensors = load_file(copy / "model.safetensors")
    projector = [name for name in tensors if "multi_modal_projector" in name]
    assert len(projector) == 4
    opened = open_model(options(model=str(copy)))
    renamed = {name.replace("multi_modal_projector", "connector"): t for name, t in tensors.items()}
    save_file(renamed, copy / "model.safetensors")
    with pytest.raises(StartupError, match="lacks 4 of the model's tensors, multi_modal") as caught:
        load_model(opened, CPU)
    said = str(caught.value)
    assert said.count("connector.linear_") == 3 and "weight_prefixes" in said
    known = {name for name in tensors if name not in projector}
    save_file({name: tensors[name] for name in known}, copy / "model.safetensors")
    with pytest.raises(StartupError, match="lacks 4 of the model's tensors, multi_modal"):
        load_model(opened, CPU)
