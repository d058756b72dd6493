"""Whole models with quantised weights and an FP8 cache, without a server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_engine_kernels import ops
from mm_engine_kernels.quantized import FP8
from PIL import Image

from checkpoints import make_llava
from mm_engine import LLM, SamplingParams
from mm_engine.config import EngineConfig
from mm_engine.errors import StartupError
from mm_engine.models.layers import Linear
from mm_engine.models.quantization_schemes import BITS
from mm_engine.sequence import ScheduledBatch, ScheduledSequence
from parity import picture
from poisoned import NUM_BLOCKS, POISON, make_poisoned
from sequences import make_sequence

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SMALL: dict[str, Any] = {"progress": False, "kv_cache_memory": 1 << 22, "max_model_len": 256}


def prompts(pictures: list[Image.Image]) -> list[Any]:
    text = "USER: <image>\nWhat is in the picture? ASSISTANT:"
    return [{"prompt": text, "multi_modal_data": {"image": picture}} for picture in pictures] + [
        "Hello there, what is in the"
    ]


def answers(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(prompts([picture(1), picture(2)]), GREEDY, use_tqdm=False)
    assert all(output.error is None for output in outputs)
    return [list(output.outputs[0].token_ids) for output in outputs]


def linears(llm: LLM) -> dict[str, Linear]:
    model = llm.engine.runner._runner.model  # type: ignore[attr-defined]
    return {name: part for name, part in model.named_modules() if isinstance(part, Linear)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("backbone", ["llama", "qwen2", "gemma2"])
def test_backbones_are_quantised_and_heads_by_our_kernels_only(
    backbone: str, quantization: str, dtype: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = make_llava(tmp_path, backbone=backbone)
    with caplog.at_level(logging.INFO):
        llm = LLM(str(path), dtype=dtype, quantization=quantization, **SMALL)
    plain = LLM(str(path), dtype=dtype, **SMALL)
    assert f" linear layers to {quantization}" in caplog.text
    assert llm.engine.info.num_parameters == plain.engine.info.num_parameters
    found = linears(llm)
    assert found
    ours = quantization in BITS and ops.quantize_linear(torch.ones(8, 32), 8) is not None
    for name, layer in found.items():
        is_head = "lm_head" in name
        assert bool(layer.quantized) == (ours or not is_head), name
        if layer.quantizer is not None:
            assert layer.quantizer.scheme.name == ("int8" if is_head else quantization)
        assert (layer.weight.numel() == 0) == bool(layer.quantized) or layer.packed is not None
    heads = [name for name in found if "lm_head" in name]
    assert len(heads) == (backbone != "qwen2")  # whose is tied to the embeddings
    told = bool(heads) and ours and quantization == "int4"
    assert (f"to {quantization} (the head to int8): " in caplog.text) == told
    assert all(len(answer) == 12 for answer in answers(llm))


@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_dummy_weights_are_quantised_too(load_format: str, llava: Path) -> None:
    llm = LLM(str(llava), dtype="float32", quantization="int8", load_format=load_format, **SMALL)
    with_head = ops.quantize_linear(torch.ones(8, 32), 8) is not None
    assert sum(bool(layer.quantized) for layer in linears(llm).values()) == 8 + with_head
    answers(llm)


def test_quantised_answers_do_not_depend_on_how_prompts_are_cut(llava: Path) -> None:
    options = {"dtype": "float32", "quantization": "int8", "kv_cache_dtype": "fp8", **SMALL}
    whole = LLM(str(llava), **options)
    chunked = LLM(str(llava), max_num_batched_tokens=7, **options)
    assert answers(whole) == answers(chunked) == answers(chunked)  # the last from the prefix cache


@pytest.mark.parametrize("backbone", ["llama", "mistral", "gemma2"])
def test_the_cache_in_fp8_takes_a_quarter_of_float32s(backbone: str, tmp_path: Path) -> None:
    path = make_llava(tmp_path, backbone=backbone)
    plain = LLM(str(path), dtype="float32", **SMALL)
    llm = LLM(str(path), dtype="float32", kv_cache_dtype="fp8_e4m3", **SMALL)
    assert llm.engine.info.num_blocks // 4 == plain.engine.info.num_blocks
    caches = llm.engine.runner._runner.kv_caches  # type: ignore[attr-defined]
    assert {cache.dtype for pair in caches for cache in pair} == {FP8}
    # What keys of blocks are over: cached values depend on the cache's dtype.
    models = [engine.kv_cache._keys_of._model for engine in (llm.engine, plain.engine)]
    assert [b"float8_e4m3fn" in model for model in models] == [True, False]
    answers(llm)


def test_nan_in_an_fp8_cache_is_blamed_and_cleaned_up(tmp_path: Path) -> None:
    runner = make_poisoned(tmp_path, "llama", kv_cache_dtype="fp8")
    sick = make_sequence((1, POISON, *range(20, 34)), temperature=0.0)
    well = make_sequence((1, *range(20, 34)), temperature=0.0)
    blocks = iter(range(NUM_BLOCKS))
    for sequence in (sick, well):
        sequence.block_table = [next(blocks) for _ in range(5)]
    shares = (ScheduledSequence(sick, 6), ScheduledSequence(well, 15))
    results = runner.run(ScheduledBatch(shares)).tokens
    assert results[0].error is not None and "NaN" in results[0].error.message
    assert results[1].error is None and results[1].token_id is not None
    assert {cache.dtype for pair in runner.kv_caches for cache in pair} == {FP8}
    assert all(cache.float().isfinite().all() for pair in runner.kv_caches for cache in pair)


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("quantization", "fp4", "None, fp8, int8, int4"),
        ("quantization", "", "None, fp8"),
        ("kv_cache_dtype", "int8", "auto, fp8, fp8_e4m3"),
        ("kv_cache_dtype", None, "auto, fp8"),
    ],
)
def test_unknown_names_are_refused(field: str, value: Any, named: str) -> None:
    with pytest.raises(StartupError, match=f"{field} is not known: {value!r}. Use one of {named}"):
        EngineConfig(model="x", **{field: value})


def test_weights_of_nan_are_refused_by_name(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = make_llava(tmp_path)
    file = path / "model.safetensors"
    tensors = load_file(file)
    (name,) = (name for name in tensors if name.endswith("layers.1.mlp.up_proj.weight"))
    tensors[name] = torch.full_like(tensors[name], float("nan"))
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(StartupError, match=r"NaN or infinity.*layers\.1\.mlp\.up_proj\.weight\. F"):
        LLM(str(path), dtype="float32", quantization="int4", **SMALL)
