"""Compiles every kernel as its launcher would launch it on a card, where there is none.

Run as a script, without TRITON_INTERPRET: `compiling.py FOLDER` prints a line of JSON for each
kernel. The interpreter accepts things that the compiler rejects.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from mm_engine_kernels.triton import (
    device,
    merge_by_position,
    paged_decode,
    paged_prefill,
    rms_norm,
    rotary,
    sample,
    silu_mul,
    write_kv,
)
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

BF16, FP8, F32 = torch.bfloat16, torch.float8_e4m3fn, torch.float32
PROCESSORS = 132

NUM_SEQS, KV_HEADS, BLOCK_SIZE = 8, 8, 16


def empty(*shape: int, dtype: torch.dtype = BF16) -> Any:
    """A tensor that takes no memory; its address counts as aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")


def caches(head: int, dtype: torch.dtype, block_size: int = BLOCK_SIZE) -> tuple[Any, Any]:
    shape = (256, block_size, KV_HEADS, head)
    return empty(*shape, dtype=dtype), empty(*shape, dtype=dtype)


def ints(*shape: int) -> Any:
    return empty(*shape, dtype=torch.int32)


def decode(
    head: int, dtype: torch.dtype, cache: torch.dtype, group: int = 1, **options: Any
) -> Callable[[], Any]:
    def launch() -> Any:
        query = empty(NUM_SEQS, KV_HEADS * group, head, dtype=dtype)
        block_size = options.pop("block_size", BLOCK_SIZE)
        return paged_decode.paged_decode(
            query,
            *caches(head, cache, block_size),
            ints(NUM_SEQS, 64),
            ints(NUM_SEQS),
            0.1,
            max_context_len=4096,
            **options,
        )

    return launch


def prefill(
    head: int, dtype: torch.dtype, cache: torch.dtype, group: int = 1, **options: Any
) -> Callable[[], Any]:
    def launch() -> Any:
        query = empty(1024, KV_HEADS * group, head, dtype=dtype)
        block_size = options.pop("block_size", BLOCK_SIZE)
        options.setdefault("max_query_len", 512)
        return paged_prefill.paged_prefill(
            query,
            *caches(head, cache, block_size),
            ints(NUM_SEQS, 64),
            ints(NUM_SEQS + 1),
            ints(NUM_SEQS),
            0.1,
            **options,
        )

    return launch


def store(head: int, dtype: torch.dtype, cache: torch.dtype) -> Callable[[], Any]:
    def launch() -> None:
        fused = empty(64, 3 * KV_HEADS, head, dtype=dtype)
        key, value = fused[:, KV_HEADS : 2 * KV_HEADS], fused[:, 2 * KV_HEADS :]
        slots = empty(64, dtype=torch.int64)
        write_kv.write_kv(key, value, *caches(head, cache), slots)

    return launch


def small_ops() -> None:
    """What a layer does beside matrices and attention, and the merge before the first."""
    x, weight = empty(64, 4096), empty(4096)
    rms_norm.rms_norm(x, weight, 1e-5)
    rms_norm.add_rms_norm(x, x, weight, 1e-5)
    rotary.rotary(empty(64, 48, 128)[:, :40], empty(64, 128), empty(64, 128))
    silu_mul.silu_mul(empty(64, 2 * 11008))
    merge_by_position.merge_by_position(x, empty(9, 4096, dtype=F32), empty(9, dtype=torch.int64))


def draw() -> None:
    """A row of a large vocabulary, and one that isn't aligned."""
    for size in (151936, 32003):
        numbers = [empty(8, dtype=F32) for _ in range(3)]
        uniform, top_k = empty(8, dtype=torch.float64), empty(8, dtype=torch.int64)
        logits, (temperature, top_p, min_p) = empty(8, size, dtype=F32), numbers
        sample.sample(logits, uniform, temperature, top_k, top_p, min_p)


#: A representative subset, by capability: every kernel, each dtype of caches, each shape of tiles
#: that the launchers choose for head sizes 64, 128 and 256. All combinations would take minutes.
LAUNCHES: dict[int, dict[str, Callable[[], Any]]] = {
    90: {
        "decode-64": decode(64, BF16, BF16, group=7),
        "decode-128-fp8": decode(128, BF16, FP8, group=4, block_size=64),
        "decode-256-window-cap": decode(256, BF16, BF16, 2, sliding_window=4096, softcap=50.0),
        "prefill-64": prefill(64, BF16, BF16, group=7),
        "prefill-128": prefill(128, BF16, BF16),
        "prefill-128-fp8": prefill(128, BF16, FP8, block_size=64),
        "prefill-128-short": prefill(128, BF16, BF16, max_query_len=6),
        "prefill-256-window-cap": prefill(256, BF16, BF16, 2, sliding_window=4096, softcap=50.0),
        "prefill-64-float32": prefill(64, F32, F32),
        "write-128": store(128, BF16, BF16),
        "small-ops": small_ops,
        "sample": draw,
    },
    80: {
        "decode-128-one-split": decode(128, BF16, BF16, num_splits=1),
        "decode-64-fp8": decode(64, BF16, FP8, group=4),
        "prefill-128": prefill(128, BF16, BF16),
        "write-128-fp8": store(128, BF16, FP8),
    },
    86: {
        "prefill-80": prefill(80, BF16, BF16),
        "prefill-256": prefill(256, BF16, BF16),
    },
}


class Driver:
    """Stands for a card of one capability; it can compile for it and nothing else."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch  # kernels are remembered by device

    def get_current_stream(self, _: int) -> int:
        return 0


def compiled_by(launch: Callable[[], Any], arch: int) -> Iterator[dict[str, Any]]:
    """Launch, but compile only; one record for each kernel launched."""
    triton.runtime.driver.set_active(Driver(arch))
    device.capability.__globals__["_properties"] = lambda _: ((arch // 10, arch % 10), PROCESSORS)
    kernels: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernels.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return kernels[-1]

    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    for kernel in kernels:
        yield {
            "kernel": kernel.metadata.name,
            "shared": kernel.metadata.shared,
            **resources(kernel.asm["cubin"]),
            "wgmma": "wgmma" in kernel.asm["ptx"],
        }


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack: what didn't fit the registers lies there."""
    path = Path(sys.argv[1]) / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    shown = subprocess.run(
        [tool, "--dump-resource-usage", path], capture_output=True, text=True, check=True
    ).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", shown))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found["LOCAL"])}


def main() -> None:
    """Compile all."""
    wanted = sys.argv[2:]
    for arch, launches in LAUNCHES.items():
        for name, launch in launches.items():
            if wanted and name not in wanted:
                continue
            before = time.process_time()
            for record in compiled_by(launch, arch):
                seconds = time.process_time() - before
                line = {"arch": arch, "launch": name, **record, "seconds": round(seconds, 2)}
                sys.stdout.write(json.dumps(line) + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
