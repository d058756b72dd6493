"""One process's part of the model, with its part of the KV cache: what every rank computes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mm_engine_kernels import ops, reference
from mm_engine_kernels.quantized import FP8
from torch import Tensor

from mm_engine.attention.backend import Attention, block_size_of
from mm_engine.attention.metadata import AttentionMetadata
from mm_engine.attention.select import choose, needs_of
from mm_engine.config import EngineConfig
from mm_engine.errors import MMEngineError
from mm_engine.models.weights import device_is_lost
from mm_engine.plugins.blame import kind_of, may_be_the_users, one_line
from mm_engine.worker.batch import StepLayout
from mm_engine.worker.graphs import DecodeGraphs
from mm_engine.worker.loader import OpenedModel, load_model, pick_device
from mm_engine.worker.memory import DeviceMemory, size_of, zeros
from mm_engine.worker.transfers import to_device


class ModelShard:
    """Owns one rank's weights and KV cache tensors: all of them, where the rank is alone."""

    def __init__(self, opened: OpenedModel, config: EngineConfig) -> None:
        self.opened = opened
        shard = opened.ctx.shard
        self.device = pick_device(config, shard.rank)
        self.dtype = opened.ctx.dtype
        self.cache_dtype = FP8 if config.kv_cache_dtype.startswith("fp8") else self.dtype
        self.memory = DeviceMemory(self.device, config.memory_utilization, num_sharing=shard.size)
        loaded = load_model(opened, self.device)
        self.model = loaded.model
        self.num_parameters, self.load_seconds = loaded.num_parameters, loaded.seconds
        self.weight_bytes = size_of(self.model)
        self.layers = [m for m in self.model.modules() if isinstance(m, Attention)]
        for index, layer in enumerate(self.layers):
            layer.layer_index = index
        needs = needs_of(
            self.layers,
            self.device,
            self.dtype,
            kv_dtype=self.cache_dtype,
            block_size=config.block_size,
        )
        self.backend = choose(config.attention_backend, needs)
        self.block_size = block_size_of(self.backend, config.block_size)
        self.vocab_size = int(opened.ctx.text_config.vocab_size)
        self.hidden_size = int(opened.ctx.text_config.hidden_size)
        self.max_model_len = opened.ctx.max_model_len
        self.max_graphed = min(config.max_num_seqs, config.max_num_batched_tokens)  # sequences
        self.kv_caches: list[tuple[Tensor, Tensor]] = []
        self.graphs: DecodeGraphs | None = None

    @property
    def cache_bytes_per_block(self) -> int:
        """Bytes that one block of the KV cache takes over all layers."""
        values = sum(2 * layer.num_kv_heads * layer.head_dim for layer in self.layers)
        return values * self.block_size * self.cache_dtype.itemsize

    def init_cache(self, num_blocks: int) -> None:
        """Allocate the KV cache, zeroed: unwritten slots of a block are read, then masked."""
        self.graphs = None  # they read and write the one before
        self.kv_caches = [
            (
                zeros(shape, self.cache_dtype, self.device),
                zeros(shape, self.cache_dtype, self.device),
            )
            for shape in (
                (num_blocks, self.block_size, layer.num_kv_heads, layer.head_dim)
                for layer in self.layers
            )
        ]

    def clean(self, slots: Tensor) -> None:
        """Zero what a share of a step wrote to `slots`.

        What stands before it was computed by steps without a fault, and others may be reading it.
        """
        with torch.inference_mode():
            for caches in self.kv_caches:
                for cache in caches:
                    reference.indexable(cache).flatten(0, 1).index_fill_(0, slots, 0)

    def capture_graph(self, size: int, dtype: torch.dtype) -> None:
        """Capture the graph for `size` sequences, whose embeddings are of `dtype`.

        Raises:
            CaptureFailed: it can't be captured.
        """
        if self.graphs is None:
            self.graphs = DecodeGraphs(self, dtype)
        self.graphs.capture(size)

    def drop_graphs(self) -> None:
        """Run every step eagerly from now on."""
        self.graphs = None

    def end_trial(self) -> None:
        """Give up the graphs that were tried, and their cache; `memory` keeps what all take."""
        if self.graphs is not None:
            first, *others = self.graphs.taken
            left = len(self.graphs.sizes) - 1
            self.memory.graphs = first + left * max(others, default=0)
        self.graphs = None
        self.kv_caches = []

    def compute(
        self, input_ids: Tensor, embeds: Tensor, layout: StepLayout, graph: int = 0
    ) -> tuple[Tensor, Tensor | None]:
        """Hidden states `[T, hidden]` of a step, and logits `[R, vocab]` of its sampled rows.

        A `graph` is replayed if it isn't 0; the next step then overwrites the hidden states, as
        soon as the device has come to it.

        Raises:
            PluginError: the model raised, or returned something else.
        """
        if graph:
            assert self.graphs is not None
            hidden = self.graphs.run(graph, input_ids, embeds, layout)
        else:
            tensors = layout.tensors(self.backend, self.kv_caches, self.device)
            hidden = self.hidden_states(input_ids, embeds, tensors.positions, tensors.metadata)
        num_rows = len(layout.sampled_rows)
        if not num_rows:
            return hidden, None
        rows = to_device(layout.sampled_rows, self.device)
        with self.blamed("compute_logits"):
            logits: Tensor = self.model.compute_logits(hidden[rows])
            self.check_shape("compute_logits", "logits", logits, [num_rows, self.vocab_size])
        return hidden, logits

    def hidden_states(
        self, input_ids: Tensor, embeds: Tensor, positions: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """`[T, hidden]` of T tokens.

        Raises:
            PluginError: the model raised, or returned something else.
        """
        with self.blamed("forward"):
            hidden: Tensor = self.model.forward(
                input_ids, positions, metadata, inputs_embeds=embeds
            )
            self.check_shape("forward", "hidden states", hidden, [len(input_ids), self.hidden_size])
        return hidden

    @contextmanager
    def blamed(self, method: str) -> Iterator[None]:
        """Turn what a method of the model raises into a `PluginError`; the model is a plugin's."""
        try:
            yield
        except (MMEngineError, torch.OutOfMemoryError):
            raise
        except BaseException as error:  # SystemExit too: a plugin doesn't end the engine
            if may_be_the_users(error) or device_is_lost(error):
                raise
            raise self.opened.plugin.blame(method, f"raised {one_line(error)}", error) from error

    def check_shape(self, method: str, what: str, got: object, wanted: list[int]) -> None:
        """Raise `PluginError` unless `got` is a tensor of numbers of this shape, where it runs."""
        if not isinstance(got, Tensor):
            raise self.opened.plugin.blame(method, f"expected {what}, got {kind_of(got)}")
        if list(got.shape) != wanted:
            fact = f"expected {what} of shape {wanted}, got {list(got.shape)}"
            raise self.opened.plugin.blame(method, fact)
        if not got.is_floating_point() or got.device.type != self.device.type:
            fact = f"expected {what} of a floating dtype on {self.device.type}, got {kind_of(got)}"
            raise self.opened.plugin.blame(method, f"{fact} on {got.device.type}")


def share_threads(size: int) -> None:
    """Leave the other ranks on this machine their part of the CPU's cores."""
    ops.set_num_threads(max(1, torch.get_num_threads() // size))
