"""The KV cache gets what a step at its peak leaves over."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import torch
from torch import nn

from mm_engine.models.layers import Linear
from mm_engine.models.packed_weights import PackedLinear
from mm_engine.worker import memory
from mm_engine.worker.memory import DeviceMemory, available_ram, peak_rss, readable, size_of, zeros

CPU = torch.device("cpu")
MIB = 2**20


def limit(folder: Path, maximum: str, current: int) -> None:
    (folder / "memory.max").write_text(f"{maximum}\n")
    (folder / "memory.current").write_text(f"{current}\n")


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder where the container's limit would be."""
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def test_a_containers_limit_counts_where_it_is_the_lower(cgroup: Path) -> None:
    limit(cgroup, str(100 * MIB), 30 * MIB)
    assert available_ram() == 70 * MIB


def test_a_container_over_its_limit_has_nothing_left(cgroup: Path) -> None:
    limit(cgroup, str(100 * MIB), 130 * MIB)
    assert available_ram() == 0


@pytest.mark.parametrize("maximum", ["max", str(2**60), None])
def test_without_a_lower_limit_the_machines_memory_counts(
    maximum: str | None, cgroup: Path
) -> None:
    if maximum is not None:
        limit(cgroup, maximum, 0)
    machine = psutil.virtual_memory()
    assert machine.total / 1000 < available_ram() <= machine.total


def test_what_a_step_takes_at_its_peak_is_left_out(cgroup: Path) -> None:
    limit(cgroup, str(1000 * MIB), 0)
    device = DeviceMemory(CPU, 0.5)
    assert device.available() == 500 * MIB
    with device.measured():
        # Where the old peak can't be forgotten, more than this process ever held.
        spare = max(0, peak_rss() - psutil.Process().memory_info().rss)
        torch.ones(spare // 4 + 64 * MIB)  # 256 MiB above
    assert device.peak > 240 * MIB
    assert device.available() == 500 * MIB - device.peak


def test_the_highest_of_several_peaks_counts() -> None:
    device = DeviceMemory(CPU, 0.9)
    device.peak = 2**62
    with device.measured():
        pass
    assert device.peak == 2**62


def test_pages_of_files_that_were_read_give_way(cgroup: Path) -> None:
    """Weights that were just read lie in the page cache, which counts as the container's."""
    limit(cgroup, str(100 * MIB), 90 * MIB)
    (cgroup / "memory.stat").write_text(f"anon {MIB}\ninactive_file {60 * MIB}\nslab 5\n")
    assert available_ram() == 70 * MIB
    (cgroup / "memory.stat").write_text(f"anon {MIB}\nslab 5\n")
    assert available_ram() == 10 * MIB


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux only: clear_refs")
def test_what_loading_took_is_not_counted() -> None:
    torch.ones(64 * MIB)  # 256 MiB, freed at once
    device = DeviceMemory(CPU, 0.9)
    with device.measured():
        pass
    assert device.peak < 64 * MIB


class Card:
    """A card of 1000 bytes, of which others have taken 100."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.reserved, self.allocated, self.outside = 0, 0, 100
        self.peak = 0
        for name, function in {
            "mem_get_info": lambda: (1000 - self.outside - self.reserved, 1000),
            "memory_reserved": lambda: self.reserved,
            "memory_allocated": lambda: self.allocated,
            "max_memory_allocated": lambda: self.peak,
            "synchronize": lambda: None,
            "reset_peak_memory_stats": lambda: None,
            "empty_cache": self.empty_cache,
        }.items():
            patch.setattr(torch.cuda, name, function)

    def empty_cache(self) -> None:
        self.reserved = self.allocated


def test_on_a_card_weights_peak_graphs_and_libraries_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = Card(monkeypatch)
    device = DeviceMemory(torch.device("cuda"), 0.9)
    assert (device.outside, device.free(), device.available()) == (0, 900, 800)
    card.reserved, card.allocated = 260, 250  # weights
    with device.measured():
        card.outside += 30  # NCCL's buffers, say
        card.peak, card.reserved = 320, 350
    assert (device.peak, device.outside) == (70, 30)
    assert device.free() == 1000 - 250 - 130
    assert device.available() == 1000 - 100 - 250 - 130 - 70
    device.graphs = 40
    assert device.available() == 1000 - 100 - 250 - 130 - 70 - 40


def test_a_models_size_counts_what_is_packed_and_shared_once() -> None:
    model = nn.Module()
    model.plain = Linear(4, 2)
    model.tied = nn.Linear(4, 2, bias=False)
    model.tied.weight = model.plain.weight
    model.packed = Linear(8, 2)
    model.packed.packed = SimpleNamespace(nbytes=32)
    model.packed.weight = nn.Parameter(torch.empty(0))
    model.quantized = Linear(8, 2)
    model.quantized.quantized = (torch.empty(16, dtype=torch.int8), torch.empty(2))
    model.quantized.weight = nn.Parameter(torch.empty(0))
    model.register_buffer("table", torch.empty(3))
    model.encoder = nn.Linear(4, 6)
    plain = 4 * 6 * 4 + 6 * 4
    assert size_of(model) == 32 + 32 + (16 + 8) + 12 + plain
    PackedLinear.adopt(model.encoder, cast(Any, SimpleNamespace(nbytes=128)))
    assert size_of(model) == 32 + 32 + (16 + 8) + 12 + 128 + 6 * 4


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0.0 GiB"),
        (13 * 2**30 + 2**28, "13.2 GiB"),
        (2**29, "0.5 GiB"),
        (5 * 2**20, "5 MiB"),
    ],
)
def test_sizes_are_written_in_gib(size: int, text: str) -> None:
    assert readable(size) == text


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="resident memory is Linux's")
def test_zeros_take_memory_where_they_are_written_to() -> None:
    before = psutil.Process().memory_info().rss
    cache = zeros((64, 2**20), torch.bfloat16, CPU)
    assert psutil.Process().memory_info().rss - before < 2**24
    assert cache.shape == (64, 2**20) and cache.dtype == torch.bfloat16
    cache[3] = 1
    assert cache.data_ptr() % 64 == 0
    assert cache[2:5].float().sum() == 2**20
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        zeros((2**45,), torch.float32, CPU)
    assert zeros((0, 3), torch.float32, CPU).shape == (0, 3)
