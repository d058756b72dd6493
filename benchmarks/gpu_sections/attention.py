"""Attention by each backend that runs here, and the small kernels against their plain meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from mm_engine_kernels import ops
from torch import Tensor

from gpu_sections.measure import Row, Section, measure
from gpu_sections.run import Run, reason
from gpu_sections.shapes import attention_flops
from mm_engine.attention.backend import Attention, AttentionBackend, Needs, block_size_of
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.attention.probe import try_out
from mm_engine.attention.select import BACKENDS, needs_of

TRITON_TARGET = 1.15  # times flash-attn's
Lens = Sequence[tuple[int, int]]  # of each sequence: new tokens, all tokens


def attention(run: Run, out: Section) -> None:
    """Time of each backend for decodes and prefills, the write of keys and values taken out.

    `attend` writes and then attends, with the same kernel for the write in all backends that a GPU
    is for: its time is measured beside and subtracted. The floor of a decode is its keys and values
    over the copy bandwidth, that of a prefill its FLOPs over the matrix rate; a cache that fits the
    card's L2 is read from there, and faster. The target is for Triton: its time over flash-attn's.
    """
    out.details["backends"] = told = {}
    for heads, shape in run.scale.heads.items():
        layer = Attention(*shape)
        layer.layer_index = 0
        needs = needs_of([layer], run.device, run.dtype)
        backends = {}
        for kind in BACKENDS:
            try:
                why = kind.unfit(needs)
                if why is None:
                    made = kind()
                    why = try_out(made, needs)
                    if why is None:
                        backends[kind.name] = made
            except Exception as error:  # of one backend; the others go on
                why = reason(error)
            told[f"{kind.name}, {heads}"] = why or f"runs {backends[kind.name].version}".strip()
        for name, lens in shapes(run):
            _compare(run, out, f"{name}, {heads}", layer, needs, backends, lens)


def shapes(run: Run) -> Iterator[tuple[str, Lens]]:
    """Steps to measure, by name."""
    scale = run.scale
    for context in scale.contexts:
        for batch in scale.batches:
            yield f"decode {batch} × {context}", [(1, context)] * batch
    length = scale.num_patches + scale.num_text
    yield f"prefill {scale.num_prefills} × {length}", [(length, length)] * scale.num_prefills


def _compare(
    run: Run,
    out: Section,
    name: str,
    layer: Attention,
    needs: Needs,
    backends: dict[str, AttentionBackend],
    lens: Lens,
) -> None:
    """Rows of one shape."""
    seconds: dict[str, float] = {}
    for kind, backend in backends.items():
        try:
            seconds[kind] = attend_seconds(run, backend, layer, needs, lens)
        except Exception as error:  # of one backend; the others go on
            out.details.setdefault("failed", {})[f"{name}: {kind}"] = reason(error)
    flash = seconds.get("flash-attn")
    if lens[0][0] == 1:
        size = 2 * layer.num_kv_heads * layer.head_dim * run.dtype.itemsize
        floor = run.seconds_of_bytes(sum(total for _, total in lens) * size)
    else:
        best = run.floor("matrix_flops_per_second")
        flops = attention_flops(layer.num_heads, layer.head_dim, [new for new, _ in lens])
        floor = None if best is None else flops / best
    for kind, taken in seconds.items():
        out.rows.append(
            Row(
                f"attention, {name}: {kind}",
                taken * 1e3,
                "ms",
                None if floor is None else floor * 1e3,
                None if flash is None else taken / flash,
                ratio_of="of flash-attn's time",
                target=TRITON_TARGET if kind == "triton" else None,
                at_most=True,
            )
        )


def attend_seconds(
    run: Run, backend: AttentionBackend, layer: Attention, needs: Needs, lens: Lens
) -> float:
    """Seconds of one layer's attention over a cache of noise, each sequence in its own blocks."""
    device, dtype = run.device, run.dtype
    size = block_size_of(backend, needs.block_size)
    needed = [-(-total // size) for _, total in lens]
    # Blocks lie apart, as they do after a while.
    order = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)).tolist()
    tables = [[order.pop() for _ in range(num)] for num in needed]
    slots = [
        table[i // size] * size + i % size
        for table, (new, total) in zip(tables, lens, strict=True)
        for i in range(total - new, total)
    ]
    cache = (sum(needed), size, layer.num_kv_heads, layer.head_dim)
    caches = tuple(torch.randn(cache, device=device, dtype=dtype) for _ in range(2))
    query, key, value = (
        torch.randn(len(slots), heads, layer.head_dim, device=device, dtype=dtype)
        for heads in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    )
    rows = [table + table[:1] * (max(needed) - len(table)) for table in tables]
    metadata = AttentionMetadata.of_lens(
        backend,
        [(caches[0], caches[1])],
        torch.tensor(slots, device=device),
        torch.tensor(rows, dtype=torch.int32, device=device),
        [new for new, _ in lens],
        [total for _, total in lens],
    )
    with torch.inference_mode():
        both = measure(lambda: backend.attend(query, key, value, layer, metadata), device)
        write = measure(lambda: ops.write_kv(key, value, *caches, metadata.slot_mapping), device)
    return max(both - write, 1e-9)


def kernels(run: Run, out: Section) -> None:
    """Our Triton kernels and the reference ops: times, and the least by their bytes.

    Bytes are what a kernel reads and writes once, over the copy bandwidth. No targets: the table
    shows what each leaves.
    """
    candidates: dict[str, Any] = {"reference": ops.LOADERS["reference"](run.device.type)[1]}
    try:
        candidates["triton"] = ops.LOADERS["triton"](run.device.type)[1]
    except ops.Unavailable as error:
        out.details["triton"] = str(error)
    for name, (num_bytes, call) in small_ops(run).items():
        floor = run.seconds_of_bytes(num_bytes)
        for kind, module in candidates.items():
            try:
                with torch.inference_mode():
                    seconds = measure(lambda call=call, module=module: call(module), run.device)
            except Exception as error:  # of one kernel; the others go on
                out.details.setdefault("failed", {})[f"{name}: {kind}"] = reason(error)
                continue
            out.against_time(f"{name}: {kind}", seconds, floor)


def small_ops(run: Run) -> dict[str, tuple[int, Callable[[Any], object]]]:
    """By name: the bytes that an op reads and writes, and a call of it in a module of kernels."""
    text, num, dim = run.scale.text, run.scale.num_rows, run.scale.head_size
    hidden, inner = text["hidden_size"], text["intermediate_size"]
    heads, kv = text["num_attention_heads"], text["num_key_value_heads"]
    size = run.dtype.itemsize

    def noise(*shape: int, dtype: torch.dtype = run.dtype) -> Tensor:
        return torch.randn(*shape, device=run.device, dtype=dtype)

    x, residual, weight = noise(num, hidden), noise(num, hidden), noise(hidden)
    rotated, cos, sin = noise(num, heads + kv, dim), noise(num, dim), noise(num, dim)
    gate_up = noise(num, 2 * inner)
    key, value = noise(num, kv, dim), noise(num, kv, dim)
    caches = [noise(-(-num // 16), 16, kv, dim) for _ in range(2)]
    slots = torch.randperm(num, device=run.device)
    batch, vocab = max(run.scale.batches), run.scale.num_logits
    logits = noise(batch, vocab, dtype=torch.float32)

    def row(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((batch,), value, device=run.device, dtype=dtype)

    cut = (row(0.5), row(1.0), row(50, torch.int64), row(0.9), row(0.0))
    plain = (row(0.5), row(1.0), row(vocab, torch.int64), row(1.0), row(0.0))
    stream = num * hidden * size
    return {
        f"rms_norm {num} × {hidden}": (2 * stream, lambda k: k.rms_norm(x, weight, 1e-5)),
        f"add_rms_norm {num} × {hidden}": (
            4 * stream,
            lambda k: k.add_rms_norm(x, residual, weight, 1e-5),
        ),
        f"rotary {num} × {heads + kv} × {dim}": (
            2 * num * (heads + kv + 1) * dim * size,
            lambda k: k.rotary(rotated, cos, sin),
        ),
        f"silu_mul {num} × {inner}": (3 * num * inner * size, lambda k: k.silu_mul(gate_up)),
        f"write_kv {num} × {kv} × {dim}": (
            4 * num * kv * dim * size + num * 8,
            lambda k: k.write_kv(key, value, *caches, slots),
        ),
        f"sample {batch} × {vocab}": (batch * vocab * 4, lambda k: k.sample(logits, *plain)),
        f"sample {batch} × {vocab}, top-k 50, top-p 0.9": (
            batch * vocab * 4,
            lambda k: k.sample(logits, *cut),
        ),
    }
