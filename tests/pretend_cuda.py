"""While `pretending()` lasts, PyTorch has the card of `pretend_card`, and Triton runs on it.

Triton's kernels run under its interpreter, with the tiles that their launchers choose for a card of
compute capability 9.0. Everything has to run in the thread that pretends.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._device import _device_constructors

from pretend_card import Card, Launches
from pretend_tensor import Dispatch, current, on_card, pin

CAPABILITY = (9, 0)
PROCESSORS = 4  # few: the interpreter runs one program after the other
TOTAL, FREE = 2**27, 2**26  # bytes: its KV cache takes memory of the host


class Graph:
    """Stands for `torch.cuda.CUDAGraph`."""

    launches: Launches

    def replay(self) -> None:
        current.get().replay(self.launches)


class Event:
    """Stands for `torch.cuda.Event`."""

    def __init__(self, **_: Any) -> None:
        self._number, self._time = 0, 0.0

    def record(self, stream: Any = None) -> None:
        self._number, self._time = current.get().num_copies, time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        return 1000 * (later._time - self._time)

    def synchronize(self) -> None:
        current.get().arrive(self._number)

    def query(self) -> bool:
        return False  # it is a slow card


class Stream:
    """Stands for `torch.cuda.Stream`; there is one, whatever it is called."""

    device_index = 0

    def __init__(self, device: Any = None, **_: Any) -> None:
        """Of any device."""

    def wait_stream(self, other: Any) -> None:
        """All is done already."""

    def synchronize(self) -> None:
        current.get().wait("Stream.synchronize")


@contextmanager
def graph(made: Graph, **_: Any) -> Iterator[None]:
    """Stands for `torch.cuda.graph`."""
    with current.get().capture() as made.launches:
        yield


@contextmanager
def stream(_: Stream) -> Iterator[None]:
    """Stands for `torch.cuda.stream`."""
    yield


def pinning(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.tensor` or `torch.empty`, which pins without a driver."""

    def made(*args: Any, pin_memory: bool = False, device: Any = None, **kwargs: Any) -> Tensor:
        if on_card(device) and function is _tensor:  # it goes by no mode
            return function(*args, **kwargs).to(device)
        tensor = function(*args, device=device, **kwargs)
        return pin(tensor) if pin_memory else tensor

    return made


_tensor = torch.tensor


def torch_cuda(card: Card) -> dict[str, Any]:
    """What stands for the names of `torch.cuda`."""
    properties = SimpleNamespace(
        major=CAPABILITY[0],
        minor=CAPABILITY[1],
        multi_processor_count=PROCESSORS,
        name="a card that isn't there",
        total_memory=TOTAL,
    )
    return {
        "is_available": lambda: True,
        "is_bf16_supported": lambda: True,
        "_lazy_init": lambda: None,
        "_sleep": lambda _: None,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "get_device_capability": lambda _=None: CAPABILITY,
        "get_device_name": lambda _=None: properties.name,
        "get_device_properties": lambda _=None: properties,
        "mem_get_info": lambda _=None: (FREE, TOTAL),
        "memory_allocated": lambda _=None: 0,
        "memory_reserved": lambda _=None: 0,
        "max_memory_allocated": lambda _=None: 0,
        "reset_peak_memory_stats": lambda _=None: None,
        "empty_cache": lambda: None,
        "synchronize": lambda _=None: card.wait("torch.cuda.synchronize"),
        "is_current_stream_capturing": lambda: card.capturing is not None,
        "Stream": Stream,
        "Event": Event,
        "CUDAGraph": Graph,
        "graph": graph,
        "graph_pool_handle": object,
        "stream": stream,
        "set_stream": lambda _: None,
        "current_stream": lambda _=None: Stream(),
    }


@contextmanager
def pretending() -> Iterator[Card]:
    """There is a card, until this ends."""
    from mm_engine_kernels.triton import device  # here: it imports triton
    from triton.runtime.interpreter import GridExecutor

    card, execute = Card(), GridExecutor.__call__
    future = torch.__future__
    overwrites = future.get_overwrite_module_params_on_conversion()

    def launch(executor: Any, *args: Any, **kwargs: Any) -> None:
        def run(*hosts: Any, **options: Any) -> None:
            with np.errstate(all="ignore"):  # a card says nothing of NaN
                execute(executor, *hosts, **options)

        card.kernel(run, allocates=False)(*args, **kwargs)

    torch._C._ensureCUDADeviceGuardSet()  # of a PyTorch that was built for CUDA
    _device_constructors()  # are remembered, for `torch.device("meta")`: not with those of below
    device._properties.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in torch_cuda(card).items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch, "tensor", pinning(torch.tensor))
        patch.setattr(torch, "empty", pinning(torch.empty))
        patch.setattr(Tensor, "pin_memory", lambda tensor: pin(tensor.clone()))
        patch.setattr(GridExecutor, "__call__", launch)
        # `Module.to` would put the card's numbers into a parameter of the host's class.
        future.set_overwrite_module_params_on_conversion(True)
        token = current.set(card)
        try:
            with Dispatch():
                yield card
        finally:
            current.reset(token)
            future.set_overwrite_module_params_on_conversion(overwrites)
            device._properties.cache_clear()
