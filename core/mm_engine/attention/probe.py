"""A backend is tried on the card before it is trusted: a build for other cards fails only there."""

from __future__ import annotations

import random

import torch
from mm_engine_kernels import reference
from torch import Tensor

from mm_engine.attention.backend import Attention, AttentionBackend, Needs, block_size_of
from mm_engine.attention.metadata import AttentionMetadata

#: (new tokens, tokens in all), times a block: a step of decodes, one of all kinds, and one of few
#: rows, for which kernels may have a shape of their own, that is compiled when it first comes.
STEPS = (
    ((0, 0.1), (0, 2.6), (0, 1.0)),
    ((1.4, 1.4), (0, 2.3), (0.3, 1.9)),
    ((0.15, 1.3), (0, 2.3)),
)
TOLERANCE = 0.05  # of outputs around 1 in bfloat16; a wrong mask or row is off by far more


def fault_of(backend: AttentionBackend, needs: Needs) -> str | None:
    """What goes wrong when `backend` computes some small steps on the card; None: nothing does.

    On a CPU nothing is tried: what runs there depends on no driver and no card.
    """
    return None if needs.device.type == "cpu" else try_out(backend, needs)


def try_out(backend: AttentionBackend, needs: Needs) -> str | None:
    """As `fault_of`, on any device."""
    shapes = {
        (one.num_heads, one.num_kv_heads, one.head_dim, one.scale, one.sliding_window, one.softcap)
        for one in needs.layers
    }
    label = f"{backend.version} ".lstrip()
    for num_heads, num_kv_heads, head_dim, scale, window, softcap in shapes:
        layer = Attention(
            num_heads, num_kv_heads, head_dim, scale=scale, sliding_window=window, softcap=softcap
        )
        layer.layer_index = 0
        for step in STEPS:
            try:
                error = _largest_error(backend, needs, layer, step)
            except Exception as raised:
                first = (str(raised).strip() or "no message").splitlines()[0]
                return f"{label}fails on this device: {type(raised).__name__}: {first[:200]}"
            if not error <= TOLERANCE:  # nan isn't
                return f"{label}computes wrong numbers on this device (off by {error:.2g})"
    return None


def _largest_error(
    backend: AttentionBackend,
    needs: Needs,
    layer: Attention,
    step: tuple[tuple[float, float], ...],
) -> float:
    size = block_size_of(backend, needs.block_size)
    generator = torch.Generator().manual_seed(0)
    lens = [(max(1, int(new * size)), max(1, int(total * size))) for new, total in step]
    needed = [-(-total // size) for _, total in lens]
    order = random.Random(0).sample(range(sum(needed)), sum(needed))
    tables = [[order.pop() for _ in range(num)] for num in needed]
    slots = [
        table[i // size] * size + i % size
        for table, (new, total) in zip(tables, lens, strict=True)
        for i in range(total - new, total)
    ]

    def noise(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*shape, generator=generator).to(needs.device, dtype)

    shape = (sum(needed), size, layer.num_kv_heads, layer.head_dim)
    caches = (noise(*shape, dtype=needs.kv_dtype), noise(*shape, dtype=needs.kv_dtype))
    query = noise(len(slots), layer.num_heads, layer.head_dim, dtype=needs.dtype)
    key = noise(len(slots), layer.num_kv_heads, layer.head_dim, dtype=needs.dtype)
    value = noise(len(slots), layer.num_kv_heads, layer.head_dim, dtype=needs.dtype)
    rows = [table + table[:1] * (max(needed) - len(table)) for table in tables]
    metadata = AttentionMetadata.of_lens(
        backend,
        [caches],
        torch.tensor(slots, device=needs.device),
        torch.tensor(rows, dtype=torch.int32, device=needs.device),
        [new for new, _ in lens],
        [total for _, total in lens],
    )
    with torch.inference_mode():
        got = backend.attend(query, key, value, layer, metadata).float().cpu()
    keys, values = (cache.cpu().float() for cache in caches)
    written = [
        (cache.flatten(0, 1)[slots] - new.to(needs.kv_dtype).cpu().float()).abs().max()
        for cache, new in ((keys, key), (values, value))
    ]
    expected = reference.paged_attention(
        query.cpu().float(),
        keys,
        values,
        metadata.block_tables.cpu(),
        metadata.query_lens,
        metadata.context_lens,
        layer.scale,
        layer.sliding_window,
        layer.softcap,
    )
    return float(torch.stack([*written, (got - expected).abs().max()]).max())
