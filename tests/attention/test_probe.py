"""A backend is tried before it is trusted: what raises, and what computes wrong, is told."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

from mm_engine.attention.backend import Attention, Needs
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.attention.probe import fault_of, try_out
from mm_engine.attention.torch_sdpa import TorchAttention

CPU = torch.device("cpu")


def needs(**options: object) -> Needs:
    layers = [
        Attention(4, 4, 16),
        Attention(6, 2, 24, sliding_window=20, scale=0.3),
        Attention(4, 1, 16, softcap=2.0),
    ]
    given = {"dtype": torch.bfloat16, "kv_dtype": torch.bfloat16, **options}
    return Needs(layers, CPU, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("block_size", [1, 3, 16, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_that_works_has_no_fault(block_size: int, dtype: torch.dtype) -> None:
    asked = needs(dtype=dtype, kv_dtype=dtype, block_size=block_size)
    assert try_out(TorchAttention(), asked) is None


class Raises(TorchAttention):
    version = "1.2.3"

    def attend(self, *args: object) -> Tensor:
        raise RuntimeError("CUDA error: no kernel image is available\nCompile with ...")


def test_one_that_raises_is_told_in_a_line() -> None:
    told = "1.2.3 fails on this device: RuntimeError: CUDA error: no kernel image is available"
    assert try_out(Raises(), needs()) == told


class Wrong(TorchAttention):
    """Spoils what the real one computes, in steps that have this many rows for a sequence."""

    version = "1.2.3"

    def __init__(self, how: str) -> None:
        self.how = how

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: Attention,
        metadata: AttentionMetadata,
    ) -> Tensor:
        layer = copy.copy(layer)
        if self.how == "window" and layer.sliding_window is not None:
            layer.sliding_window += 4
        if self.how == "softcap":
            layer.softcap = None
        out = super().attend(query, key, value, layer, metadata)
        keys, _ = metadata.kv_caches[0]
        if self.how == "a row of decodes" and metadata.max_query_len == 1:
            out[1] = float("nan")
        if self.how == "a row of prefill" and metadata.max_query_len > 1:
            out[-1] = 0
        if self.how == "a key isn't stored":
            keys.flatten(0, 1)[metadata.slot_mapping[-1]] = 0
        return out


HOWS = ["window", "softcap", "a row of decodes", "a row of prefill", "a key isn't stored"]


@pytest.mark.parametrize("how", HOWS)
def test_one_that_computes_wrong_numbers_is_told(how: str) -> None:
    fault = try_out(Wrong(how), needs())
    assert fault is not None
    assert fault.startswith("1.2.3 computes wrong numbers on this device (off by ")


def test_on_a_cpu_nothing_is_tried() -> None:
    assert fault_of(Raises(), needs()) is None
