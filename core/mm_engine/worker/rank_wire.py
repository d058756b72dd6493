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
    """To a rank: note the peak of memory from here on, or (`ends`) up to here."""

    ends: bool


class Report(msgspec.Struct, tag=True):
    """To a rank: say what memory is left."""


class Capture(msgspec.Struct, tag=True):
    """To a rank: capture the CUDA graph for so many sequences, and say how it went."""

    size: int
    dtype: str  # of the embeddings


class EndTrial(msgspec.Struct, tag=True):
    """To a rank: give up the graphs that were tried, and their cache."""


class DropGraphs(msgspec.Struct, tag=True):
    """To a rank: compute without graphs. Where captures have failed, ranks have come apart."""

    num_calls: int  # of the group, from which all go on


class Run(msgspec.Struct, tag=True):
    """To a rank: compute this step; ids and embeddings are broadcast."""

    layout: StepLayout
    dtype: str  # of the embeddings
    graph: int  # the size of the CUDA graph to replay; 0: none


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


class Captured(msgspec.Struct, tag=True):
    """From a rank: a graph is there, or why not."""

    rank: int
    why_not: str = ""
    no_memory: bool = False


class Resume(msgspec.Struct, tag=True):
    """To a rank whose step has failed: it has in all ranks, so go on."""


class Failed(msgspec.Struct, tag=True, frozen=True):
    """From a rank: what it was told has raised. After a step it computes none until `Resume`."""

    rank: int
    number: int  # of the message that told it; the first is 0
    name: str  # of the exception's class
    message: str
    num_calls: int  # that the rank has made of the group, up to where it failed


ToRank = (
    Begin
    | InitCache
    | Measure
    | Report
    | Capture
    | EndTrial
    | DropGraphs
    | Run
    | Resume
    | Clean
    | Quit
)
FromRank = Opened | Loaded | Available | Captured | Failed

encode = msgspec.msgpack.Encoder().encode
decode_to_rank = msgspec.msgpack.Decoder(ToRank).decode
decode_from_rank = msgspec.msgpack.Decoder(FromRank).decode
