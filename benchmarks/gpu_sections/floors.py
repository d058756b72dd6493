"""The machine, and how fast it copies and multiplies: what all else is held against."""

from __future__ import annotations

from importlib import metadata
from typing import Any

import torch
from mm_engine_kernels import ops

from gpu_sections.measure import Row, Section, measure
from gpu_sections.run import Run
from gpu_sections.shapes import layer_products

PACKAGES = ("triton", "flash-attn", "transformers", "torch")


def machine(run: Run, out: Section) -> None:
    """Card, driver, CUDA, versions, which kernels are taken; the commit is in the record's head."""
    out.details["versions"] = {name: version(name) for name in PACKAGES}
    out.details["cuda"] = torch.version.cuda
    out.details["device"] = str(run.device)
    out.details["kernels"] = str(ops.chosen(run.device.type))
    if run.device.type != "cuda":
        return
    properties = torch.cuda.get_device_properties(run.device)
    free, total = torch.cuda.mem_get_info(run.device)
    out.details |= {
        "card": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "processors": properties.multi_processor_count,
        "memory_bytes": total,
        "free_bytes": free,
        "driver": driver(),
        "bfloat16": torch.cuda.is_bf16_supported(),
    }


def version(package: str) -> str | None:
    """Of an installed package; None if it isn't."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def driver() -> str | None:
    """Of NVIDIA, as its tool says."""
    import shutil
    import subprocess

    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False, timeout=15)
    lines = done.stdout.split("\n")
    return lines[0].strip() if done.returncode == 0 else None


def floors(run: Run, out: Section) -> None:
    """Copy bandwidth and matrix rate.

    Bandwidth: a device-to-device copy of a buffer many times the cache, whose bytes count twice,
    read and written. Matrix rate: products of a decoder layer's matrices with all tokens of the
    prefill, and of big square ones; the highest is what others are held against.
    """
    scale, device = run.scale, run.device
    size = scale.copy_bytes
    if device.type == "cuda":
        size = min(size, torch.cuda.mem_get_info(device)[0] // 4)
    seconds = copy_seconds(size, device)
    bandwidth = 2 * size / seconds
    out.details |= {"copy_bytes": size, "copy_bytes_per_second": bandwidth}
    out.rows.append(Row("copy bandwidth, read and written", bandwidth / 1e12, "TB/s"))

    num_tokens = scale.num_prefills * (scale.num_patches + scale.num_text)
    shapes = [(num_tokens, a, b) for a, b in layer_products(scale.text, scale.head_size)]
    shapes.append((scale.square, scale.square, scale.square))
    rates: dict[str, Any] = {}
    for m, k, n in shapes:
        x = torch.randn(m, k, device=device, dtype=run.dtype)
        weight = torch.randn(n, k, device=device, dtype=run.dtype)
        seconds = measure(lambda x=x, weight=weight: ops.linear(x, weight), device)
        rates[f"{m} × {k} × {n}"] = rate = 2 * m * k * n / seconds
        out.rows.append(Row(f"matrix rate, {m} × {k} × {n}", rate / 1e12, "TFLOP/s"))
    out.details |= {"matrix_rates": rates, "matrix_flops_per_second": max(rates.values())}


def copy_seconds(num_bytes: int, device: torch.device) -> float:
    """Seconds to copy a buffer of this size to another one on the device."""
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return measure(lambda: target.copy_(source), device)
