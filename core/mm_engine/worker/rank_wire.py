"""What rank 0 of a tensor-parallel model and the other ranks say to each other: msgpack."""

from __future__ import annotations

import msgspec

from mm_engine.config import EngineConfig
from mm_engine.plugins.record import PluginRecord
from mm_engine.worker.batch import StepLayout


class Begin(msgspec.Struct, tag=True):
    """To a rank, first and once: what to load."""

    config: EngineConfig
    plugin: PluginRecord
    store: str  # the file by which the processes find each other


class InitCache(msgspec.Struct, tag=True):
    """To a rank: make room for so many blocks, zeroed."""

    num_blocks: int


class Measure(msgspec.Struct, tag=True):
    """To a rank: from here on note the peak of memory, or (`ends`) say what it leaves."""

    ends: bool


class Run(msgspec.Struct, tag=True):
    """To a rank: compute this step; ids and embeddings are broadcast."""

    layout: StepLayout
    dtype: str  # of the embeddings


class Clean(msgspec.Struct, tag=True):
    """To a rank: zero these slots of the cache."""

    slots: list[int]


class Quit(msgspec.Struct, tag=True):
    """To a rank: end."""


class Opened(msgspec.Struct, tag=True):
    """From a rank: it has found checkpoint and plugin, and joins the others now."""

    rank: int


class Loaded(msgspec.Struct, tag=True):
    """From a rank: its weights are there, and it computes attention with this backend."""

    rank: int
    backend: str
    block_size: int


class Available(msgspec.Struct, tag=True):
    """From a rank: bytes that it could give to the KV cache."""

    rank: int
    num_bytes: int


class Failed(msgspec.Struct, tag=True):
    """From a rank: what it was told to do last raised, after so many calls of the group."""

    rank: int
    name: str  # of the exception's class
    message: str
    num_calls: int


ToRank = Begin | InitCache | Measure | Run | Clean | Quit
FromRank = Opened | Loaded | Available | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
