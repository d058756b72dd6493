"""What this machine can do at best, through torch: reads of memory, products of matrices."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protocol import serve, versions

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")


def load(threads: int) -> dict[str, Any]:
    """Import torch; how long a fresh process takes for that."""
    command = [sys.executable, "-c", "import torch"]
    seconds = []
    for _ in range(3):  # the first may read it from disk
        start = time.perf_counter()
        subprocess.run(command, check=True)
        seconds.append(time.perf_counter() - start)
    import torch

    torch.set_num_threads(threads)
    return {
        "versions": versions("torch"),
        "import_torch_seconds": statistics.median(seconds),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": flags(),
    }


def flags() -> list[str]:
    """Instruction sets that kernels choose by, where /proc tells them."""
    path = Path("/proc/cpuinfo")
    words = set(path.read_text().split()) if path.is_file() else set()
    return [name for name in FLAGS if name in words]


def bandwidth(num_bytes: int, seconds: float) -> dict[str, Any]:
    """Bytes per second of reading a buffer many times the cache, with all threads.

    The best of several ways to read it, each for a share of `seconds`. This engine's own product
    with one row is among them: a floor is no lower than what one of those held against it does.
    """
    import torch
    from mm_engine_kernels import ops

    wide = torch.ones(num_bytes // 4)
    halves = wide.view(2, -1)
    ways: dict[str, Callable[[], object]] = {
        "sum": wide.sum,
        "max": wide.max,
        "dot": lambda: torch.dot(halves[0], halves[1]),
    }
    columns = 1024
    packed = ops.pack_linear(wide[: wide.numel() // columns * columns].view(-1, columns))
    if packed is not None:
        row = torch.ones(1, columns)
        ways["mm-engine's linear"] = lambda: packed(row)
    rates = {name: num_bytes / best(way, seconds / len(ways)) for name, way in ways.items()}
    return {"bytes_per_second": max(rates.values()), "ways": rates}


def products(shapes: list[list[int]], dtype: str, seconds: float) -> dict[str, Any]:
    """FLOP/s of `[m, k]` by `[n, k]` transposed, as linear layers do, for each (m, k, n).

    Where one product takes longer than its share of `seconds`, it is measured once. This engine's
    own products are among them, for the reason that `bandwidth` gives.
    """
    import torch
    from mm_engine_kernels import ops

    kind = getattr(torch, dtype)
    rates = {}
    for m, k, n in shapes:
        x, weight = torch.randn(m, k).to(kind), torch.randn(n, k).to(kind)

        def product(x: Any = x, weight: Any = weight) -> object:
            return torch.nn.functional.linear(x, weight)

        ways = {f"{m} × {k} × {n}": product}
        packed = ops.pack_linear(weight)
        if packed is not None:
            ways[f"{m} × {k} × {n}, mm-engine's"] = lambda packed=packed, x=x: packed(x)
        with torch.inference_mode():
            for name, way in ways.items():
                rates[name] = 2 * m * k * n / best(way, seconds / len(shapes) / len(ways))
    return {"flops_per_second": max(rates.values()), "shapes": rates}


def best(call: Callable[[], object], seconds: float) -> float:
    """Least seconds of a call within so much time; a floor is what the machine can do."""
    taken: list[float] = []
    end = time.perf_counter() + seconds
    while not taken or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)


if __name__ == "__main__":
    serve({"load": load, "bandwidth": bandwidth, "products": products})
