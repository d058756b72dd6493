"""A step's tensors over a paged cache, for tests of the kernels."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import torch
from mm_engine_kernels import reference
from torch import Tensor


@dataclass
class Paged:
    """Contexts in blocks in random order; what was never written is NaN in keys, inf in values.

    `mix` is a list of (new tokens, tokens in all), sequence by sequence.
    """

    mix: list[tuple[int, int]]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 24
    block_size: int = 16
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    table_dtype: torch.dtype = torch.int32
    device: str = "cpu"
    seed: int = 0
    query: Tensor = field(init=False)
    key_cache: Tensor = field(init=False)
    value_cache: Tensor = field(init=False)
    block_tables: Tensor = field(init=False)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        num_heads, kv_heads = self.heads
        needed = [-(-total // self.block_size) for _, total in self.mix]
        blocks = list(range(sum(needed) + 2))  # two are nobody's
        random.Random(self.seed).shuffle(blocks)
        tables = [[blocks.pop() for _ in range(num)] for num in needed]
        shape = (sum(needed) + 2, self.block_size, kv_heads, self.head_dim)
        cache_dtype = self.cache_dtype or self.dtype
        keys = torch.full(shape, float("nan")).to(cache_dtype)
        values = torch.full(shape, float("inf")).to(cache_dtype)
        for table, (_, total) in zip(tables, self.mix, strict=True):
            slots = [table[i // self.block_size] * self.block_size + i % self.block_size
                     for i in range(total)]  # fmt: skip
            rows = torch.randn(2, total, kv_heads, self.head_dim, generator=generator)
            reference.write_kv(*rows, keys, values, torch.tensor(slots, dtype=torch.int64))
        num_tokens = sum(new for new, _ in self.mix)
        # The queries are a slice of one fused projection, as in the decoder.
        fused = torch.randn(
            num_tokens, num_heads + 2 * kv_heads, self.head_dim, generator=generator
        )
        self.query = fused.to(self.device, self.dtype)[:, :num_heads]
        self.key_cache, self.value_cache = keys.to(self.device), values.to(self.device)
        width = max(max(needed), 1)
        rows_of_tables = [table + [0] * (width - len(table)) for table in tables]
        self.block_tables = torch.tensor(rows_of_tables, dtype=self.table_dtype, device=self.device)

    @property
    def context_lens(self) -> Tensor:
        return self._ints([total for _, total in self.mix])

    @property
    def query_starts(self) -> Tensor:
        return self._ints(torch.tensor([0, *(new for new, _ in self.mix)]).cumsum(0).tolist())

    def _ints(self, values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self.device)

    def decode(self, ops: Any, *args: Any, **options: Any) -> Tensor:
        """`paged_decode` of `ops`, with the reference in float32."""
        longest = max(total for _, total in self.mix)
        got: Tensor = ops.paged_decode(
            self._query(ops),
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.context_lens,
            self.head_dim**-0.5,
            *args,
            max_context_len=longest,
            **options,
        )
        return got.float()

    def prefill(self, ops: Any, *args: Any, **options: Any) -> Tensor:
        """`paged_prefill` of `ops`, with the reference in float32."""
        got: Tensor = ops.paged_prefill(
            self._query(ops),
            self.key_cache,
            self.value_cache,
            self.block_tables,
            self.query_starts,
            self.context_lens,
            self.head_dim**-0.5,
            *args,
            max_query_len=max(new for new, _ in self.mix),
            **options,
        )
        return got.float()

    def _query(self, ops: Any) -> Tensor:
        return self.query.float() if ops is reference else self.query

    @property
    def tolerance(self) -> dict[str, float]:
        """Of the output, whose values are below 4: two of its dtype's smallest steps there."""
        if self.dtype == torch.float32:
            return {"rtol": 1e-5, "atol": 1e-5}
        return {"rtol": 0.0, "atol": 8 * torch.finfo(self.dtype).eps / 2}
