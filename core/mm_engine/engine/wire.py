"""What the front and the engine process say to each other: msgpack, tensors as raw buffers.

A message is a list of frames: the first holds the message, the others the bytes of its tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from mm_engine.config import EngineConfig
from mm_engine.engine.sent_tensors import Sending, SentTensors
from mm_engine.engine.status import EngineInfo, EngineStats
from mm_engine.outputs import RequestOutput
from mm_engine.plugins.record import PluginRecord
from mm_engine.request import Item, PlaceholderRange, Request
from mm_engine.sampling_params import SamplingParams

Frame = bytes | memoryview
Tensors = dict[str, Tensor]


class PackedTensor(msgspec.Struct, array_like=True):
    """A tensor whose bytes are in frame number `frame` of the message (the first is 1)."""

    dtype: str
    shape: tuple[int, ...]
    frame: int


class PackedItem(msgspec.Struct, array_like=True):
    """An `Item`, whose tensors the receiver may have from before. See `SentTensors`."""

    placeholder: PlaceholderRange
    content_key: str
    tensors: dict[str, PackedTensor] | None  # None: those that were sent with this key
    keep: bool  # keep them for items to come
    forget: list[str]  # content keys to drop first


class PackedRequest(msgspec.Struct, array_like=True):
    """A `Request`."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling_params: SamplingParams
    items: list[PackedItem]
    eos_token_ids: tuple[int, ...]
    cache_salt: str
    priority: int
    grammar: bytes | None


class Start(msgspec.Struct, tag=True):
    """To the engine, first and once: what to load, the costliest prompt, the front's plugin."""

    config: EngineConfig
    profile_request: PackedRequest
    plugin: PluginRecord | None = None  # None: the engine finds it itself


class Add(msgspec.Struct, tag=True):
    """To the engine: answer this."""

    request: PackedRequest


class Abort(msgspec.Struct, tag=True):
    """To the engine: nobody waits for this any more."""

    request_id: str


class StatsRequest(msgspec.Struct, tag=True):
    """To the engine: say how it is."""


class Shutdown(msgspec.Struct, tag=True):
    """To the engine: end."""


class Ready(msgspec.Struct, tag=True):
    """From the engine: it takes requests."""

    info: EngineInfo


class Failed(msgspec.Struct, tag=True):
    """From the engine: it can't start, or not go on. `name` is a class in `errors.py`."""

    name: str
    message: str


class Outputs(msgspec.Struct, tag=True):
    """From the engine: what a step brought."""

    outputs: list[RequestOutput]


class Stats(msgspec.Struct, tag=True):
    """From the engine: the answer to `StatsRequest`, in order."""

    stats: EngineStats


ToEngine = Start | Add | Abort | StatsRequest | Shutdown
FromEngine = Ready | Failed | Outputs | Stats

_encoder = msgspec.msgpack.Encoder()
_to_engine = msgspec.msgpack.Decoder(ToEngine)
_from_engine = msgspec.msgpack.Decoder(FromEngine)


def encode(message: ToEngine | FromEngine, tensors: Sequence[Frame] = ()) -> list[Frame]:
    """The frames of a message; `tensors` are what `pack_request` filled."""
    return [_encoder.encode(message), *tensors]


def decode_to_engine(frames: Sequence[Any]) -> ToEngine:
    """Read a message from the front. Its tensors stay in `frames` until `unpack_request`."""
    return _to_engine.decode(frames[0])


def decode_from_engine(frames: Sequence[Any]) -> FromEngine:
    """Read a message from the engine."""
    return _from_engine.decode(frames[0])


def pack_request(
    request: Request, frames: list[Frame], sent: SentTensors | None = None
) -> PackedRequest:
    """Make a request sendable. The bytes of its tensors are appended to `frames`, not copied.

    With `sent`, tensors that the receiver has are left out; the message must then be the next one
    that is sent.
    """
    # First what may fail: what `sent` plans must come to pass.
    views = [
        {name: _bytes_of(tensor) for name, tensor in item.tensors.items()} for item in request.items
    ]
    items = []
    for item, named in zip(request.items, views, strict=True):
        sending = Sending(known=False, keep=False, forget=[])
        if sent is not None:
            sending = sent.send(item.content_key, sum(view.nbytes for view in named.values()))
        tensors: dict[str, PackedTensor] | None = None
        if not sending.known:
            tensors = {}
            for name, view in named.items():
                frames.append(view)
                tensor = item.tensors[name]
                dtype = str(tensor.dtype).removeprefix("torch.")
                tensors[name] = PackedTensor(dtype, tuple(tensor.shape), len(frames))
        items.append(
            PackedItem(item.placeholder, item.content_key, tensors, sending.keep, sending.forget)
        )
    return PackedRequest(
        request.request_id,
        request.prompt_token_ids,
        request.sampling_params,
        items,
        request.eos_token_ids,
        request.cache_salt,
        request.priority,
        request.grammar,
    )


def unpack_request(
    packed: PackedRequest, frames: Sequence[Frame], kept: dict[str, Tensors] | None = None
) -> Request:
    """The request again; its tensors own their memory. `frames` are the whole message's.

    `kept` holds the tensors that stay here, by content key.
    """
    kept = {} if kept is None else kept
    items = []
    for item in packed.items:
        for key in item.forget:
            kept.pop(key, None)
        if item.tensors is None:
            tensors = kept[item.content_key]
        else:
            tensors = {name: _unpack_tensor(t, frames) for name, t in item.tensors.items()}
        if item.keep:
            kept[item.content_key] = tensors
        items.append(Item(item.placeholder, item.content_key, tensors))
    return Request(
        packed.request_id,
        packed.prompt_token_ids,
        packed.sampling_params,
        tuple(items),
        packed.eos_token_ids,
        packed.cache_salt,
        packed.priority,
        packed.grammar,
    )


def _bytes_of(tensor: Tensor) -> memoryview:
    # numpy has no bfloat16, and a tensor without dimensions can't be viewed as bytes.
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    view: memoryview = flat.view(torch.uint8).numpy().data
    return view


def _unpack_tensor(packed: PackedTensor, frames: Sequence[Frame]) -> Tensor:
    dtype = getattr(torch, packed.dtype)
    assert isinstance(dtype, torch.dtype)
    data = bytearray(frames[packed.frame])  # the copy is ours to write to
    if not data:
        return torch.empty(packed.shape, dtype=dtype)
    return torch.frombuffer(data, dtype=dtype).reshape(packed.shape)
