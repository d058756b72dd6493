"""A step's tensors for attention backends, and what the reference makes of them."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from mm_engine_kernels import reference
from torch import Tensor

from mm_engine.attention.backend import Attention, AttentionBackend, Needs
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.attention.torch_sdpa import TorchAttention

GARBAGE = 3e4  # finite, and far larger than any score
CPU = torch.device("cpu")

#: (new tokens, tokens in all) of each sequence in a step.
MIXES: dict[str, list[tuple[int, int]]] = {
    "one-decode": [(1, 9)],
    "one-token": [(1, 1)],
    "decodes": [(1, 30), (1, 31), (1, 2), (1, 17)],
    "fresh-prompt": [(13, 13)],
    "fresh-prompts": [(13, 13), (13, 13), (4, 4), (1, 1)],
    "chunk": [(5, 40)],
    "chunks": [(5, 40), (7, 40), (2, 3)],
    "all-kinds": [(1, 25), (6, 6), (9, 33), (1, 1), (1, 60), (20, 20), (3, 35)],
}


@dataclass
class Step:
    """A step's tensors: history in the cache, garbage in every slot that nothing was written to."""

    query: Tensor
    key: Tensor
    value: Tensor
    metadata: AttentionMetadata
    layer: Attention

    @property
    def needs(self) -> Needs:
        keys, _ = self.metadata.kv_caches[self.layer.layer_index]
        capability = torch.cuda.get_device_capability() if keys.is_cuda else None
        return Needs(
            [self.layer], keys.device, self.query.dtype, keys.dtype, keys.shape[1], capability
        )

    def run(self) -> Tensor:
        backend = self.metadata.backend
        return backend.attend(self.query, self.key, self.value, self.layer, self.metadata)

    def expected(self) -> Tensor:
        meta, layer = self.metadata, self.layer
        keys, values = (cache.clone() for cache in meta.kv_caches[layer.layer_index])
        reference.write_kv(self.key, self.value, keys, values, meta.slot_mapping)
        return reference.paged_attention(
            self.query,
            keys,
            values,
            meta.block_tables,
            meta.query_lens,
            meta.context_lens,
            layer.scale,
            layer.sliding_window,
            layer.softcap,
        )


def make_step(
    mix: list[tuple[int, int]],
    *,
    backend: AttentionBackend | None = None,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    heads: tuple[int, int] = (4, 2),
    head_dim: int = 24,
    block_size: int = 16,
    window: int | None = None,
    softcap: float | None = None,
    seed: int = 0,
    garbage: float = GARBAGE,
) -> Step:
    """Lay `mix` out over blocks in random order, as the worker does."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    num_heads, num_kv_heads = heads

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    lens = [total for _, total in mix]
    needed = [-(-total // block_size) for total in lens]
    blocks = list(range(sum(needed) + 3))  # three are nobody's
    rng.shuffle(blocks)
    tables = [[blocks.pop() for _ in range(num)] for num in needed]
    width = max(needed)
    shape = (sum(needed) + 3, block_size, num_kv_heads, head_dim)
    caches = [torch.full(shape, garbage), torch.full(shape, -garbage)]
    slots: list[int] = []
    for table, (new, total) in zip(tables, mix, strict=True):
        own = [table[i // block_size] * block_size + i % block_size for i in range(total)]
        history = torch.tensor(own[: total - new], dtype=torch.int64)
        for cache in caches:
            cache.flatten(0, 1)[history] = noise(total - new, num_kv_heads, head_dim)
        slots += own[total - new :]
    num_tokens = len(slots)
    # Query, key and value are slices of one fused projection, as in the decoder.
    fused = noise(num_tokens, num_heads + 2 * num_kv_heads, head_dim).to(device, dtype)
    query, key, value = fused.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    layer = Attention(num_heads, num_kv_heads, head_dim, sliding_window=window, softcap=softcap)
    layer.layer_index = 1  # the first layer's cache must stay as it is
    keys, values = (cache.to(device, dtype) for cache in caches)
    metadata = AttentionMetadata.of_lens(
        backend or TorchAttention(),
        [(torch.zeros_like(keys), torch.zeros_like(values)), (keys, values)],
        torch.tensor(slots, device=device),
        torch.tensor(
            [t + t[:1] * (width - len(t)) for t in tables], dtype=torch.int32, device=device
        ),
        [new for new, _ in mix],
        lens,
    )
    return Step(query, key, value, metadata, layer)


def assert_meets_reference(step: Step, tolerance: float = 2e-5) -> None:
    """Fail unless the step's backend gives what the reference gives, and writes where it should."""
    expected = step.expected()
    got = step.run()
    assert got.shape == step.query.shape
    assert got.dtype == step.query.dtype
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)
    assert not step.metadata.kv_caches[0][0].any()
