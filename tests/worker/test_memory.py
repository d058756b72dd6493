"""The KV cache gets what a step at its peak leaves over."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from mm_engine.worker import memory
from mm_engine.worker.memory import DeviceMemory, available_ram, peak_rss

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
