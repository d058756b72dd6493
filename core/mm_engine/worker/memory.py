"""How much memory is left for the KV cache, measured around a run at the peak."""

from __future__ import annotations

import math
import mmap
import resource
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import torch
from torch import Tensor, nn

from mm_engine.models.layers import Linear
from mm_engine.models.packed_weights import PackedWeight

CGROUP = Path("/sys/fs/cgroup")


class DeviceMemory:
    """The device's memory as this process may use it."""

    def __init__(self, device: torch.device, utilization: float, *, num_sharing: int = 1) -> None:
        self.device = device
        self.utilization = utilization
        self.num_sharing = num_sharing if device.type == "cpu" else 1  # processes, of its memory
        self.peak = 0  # bytes that a step takes beside weights and cache
        self.graphs = 0  # bytes of CUDA graphs
        self._before = 0
        self._outside = self._taken_outside()

    @property
    def outside(self) -> int:
        """Bytes of the device that libraries took beside PyTorch since this was made."""
        return max(0, self._taken_outside() - self._outside)

    def _taken_outside(self) -> int:
        """By this process and by others: nobody tells them apart."""
        if self.device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info()
        return int(total - free - torch.cuda.memory_reserved())

    def free(self) -> int:
        """Bytes of the device that nobody has taken; 0 on a CPU, whose steps keep nothing."""
        if self.device.type != "cuda":
            return 0
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def begin(self) -> None:
        """From here on note the peak of what is taken."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self._before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
        else:
            forget_peak()  # loading held more: the weights' files and the weights
            self._before = psutil.Process().memory_info().rss

    def end(self) -> None:
        """Up to here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            taken = torch.cuda.max_memory_allocated() - self._before
        else:
            taken = peak_rss() - self._before
        self.peak = max(self.peak, taken)

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Note the peak of what is taken inside over what was taken before."""
        self.begin()
        yield
        self.end()

    def available(self) -> int:
        """Bytes left for the KV cache: this share of the device's memory, less peak and graphs.

        What libraries have taken beside PyTorch by now, such as NCCL's buffers, isn't free.
        """
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            free, total = torch.cuda.mem_get_info()
            return int(free - total * (1 - self.utilization)) - self.peak - self.graphs
        return int(available_ram() * self.utilization / self.num_sharing) - self.peak


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`torch.zeros`; on a CPU, what is never written to takes no memory and no time.

    A cache for all sequences that a step may hold is gigabytes, of which most servers use little.

    Raises:
        MemoryError, RuntimeError: there is no room for it.
    """
    num_bytes = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or not num_bytes:
        return torch.zeros(*shape, dtype=dtype, device=device)
    own = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        untouched = mmap.mmap(-1, num_bytes, **own)
    except OSError as error:
        raise MemoryError(f"{readable(num_bytes)}: {error.strerror}") from error
    return torch.frombuffer(untouched, dtype=torch.uint8).view(dtype).view(*shape)


def readable(num_bytes: int) -> str:
    """A size for people: `13.2 GiB`, or `43 MiB` where it is small."""
    size = num_bytes / 2**30
    return f"{size:.1f} GiB" if size >= 0.1 or not num_bytes else f"{size * 1024:.3g} MiB"


def size_of(model: nn.Module) -> int:
    """Bytes of a model's weights and buffers, those that are packed or quantised included."""
    tensors = [*model.parameters(), *model.buffers()]
    packed = 0
    for module in model.modules():
        if isinstance(module, Linear):
            tensors += module.quantized
        if isinstance(module, Linear | PackedWeight) and module.packed is not None:
            packed += module.packed.nbytes
    return packed + sum(t.nbytes for t in {t.data_ptr(): t for t in tensors if t.numel()}.values())


def forget_peak() -> None:
    """Start `peak_rss` anew; Linux only (proc(5), clear_refs). Elsewhere the old peak stays in,
    and the KV cache comes out smaller than it could be."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss() -> int:
    """The most resident memory that this process had since `forget_peak`, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_ram() -> int:
    """Bytes of RAM to be had: the machine's, or the container's if that is less."""
    available = int(psutil.virtual_memory().available)
    limit, used = CGROUP / "memory.max", CGROUP / "memory.current"
    if limit.is_file() and used.is_file() and (text := limit.read_text().strip()) != "max":
        taken = max(0, int(used.read_text()) - _idle_file_cache())
        return min(available, max(0, int(text) - taken))
    return available


def _idle_file_cache() -> int:
    """Bytes that count as the container's but give way when memory is asked for.

    Without them, weights that were just read from disk would count twice.
    """
    statistics = CGROUP / "memory.stat"
    if statistics.is_file():
        for line in statistics.read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "inactive_file":
                return int(value)
    return 0
