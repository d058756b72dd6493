"""Steps that are recorded once and then made by C++ alone, as a CUDA graph is by a card.

Python takes longer for a layer's calls than a small model's kernels do for their work.
"""

from __future__ import annotations

import weakref
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mm_engine_kernels import _cpu

aten = torch.ops.aten
#: What makes a tensor without computing its numbers.
EMPTY = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default)
#: Methods of a tensor that tell its numbers to Python without PyTorch's dispatcher.
READING = ("tolist", "numpy", "item", "__array__", "__bool__", "__int__", "__float__", "__index__")


class NotRecorded(Exception):
    """The function does what a recording can't repeat; the message says what."""


class Recorder:
    """Makes recordings that share their memory: they never run at the same time.

    What can be recorded is a function that, between tensors which stay where they are, calls this
    package's kernels, takes views and copies whole tensors, and never looks at a number.
    """

    def __init__(self) -> None:
        self._arena = _Arena()

    @property
    def num_bytes(self) -> int:
        """That the recordings take."""
        return self._arena.num_bytes

    def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
        """Call `function` without computing anything; what is returned does what it would have.

        Raises:
            NotRecorded: it does something else. Nothing was computed.
        """
        recording = _cpu.Recording()
        recording.start()
        try:
            with _Unread(), _Traced(self._arena):
                function()
        finally:
            recording.stop()
        arena = self._arena

        def run() -> None:
            assert arena is not None  # the recording writes to its memory
            recording.run()

        return run


class _Unread(TorchFunctionMode):
    """Refuses what tells Python a tensor's numbers: the recording would keep today's."""

    def __torch_function__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        name = getattr(function, "__name__", "")
        if name in READING:
            raise NotRecorded(f"Tensor.{name} reads numbers that another step will have changed")
        return function(*args, **(kwargs or {}))


class _Traced(TorchDispatchMode):
    """Lets views and empty tensors through, records copies, refuses all other operators."""

    def __init__(self, arena: _Arena) -> None:
        super().__init__()
        self._arena = arena

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """PyTorch asks. To keep its compiler away from this class it would import it: seconds."""
        return False

    def __torch_dispatch__(
        self,
        function: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if function in EMPTY:
            return self._arena.like(function(*args, **kwargs))
        if function is aten.copy_.default:
            return _copied(args[0], args[1])
        if function.is_view:
            return function(*args, **kwargs)
        raise NotRecorded(f"{function} isn't one of the kernels")


def _copied(target: Tensor, source: Tensor) -> Tensor:
    whole = target.is_contiguous() and source.is_contiguous()
    if not whole or target.dtype != source.dtype or target.shape != source.shape:
        raise NotRecorded("a copy between tensors of different kinds isn't one of the kernels")
    _cpu.copy(source.data_ptr(), target.data_ptr(), source.nbytes)
    return target


class _Arena:
    """Memory that is handed out again as soon as the tensor that had it is gone."""

    def __init__(self) -> None:
        self._chunks: list[Tensor] = []  # [bytes] each
        self._free: list[tuple[int, int]] = []  # sizes and places in `_chunks`, ascending

    @property
    def num_bytes(self) -> int:
        """Of memory, handed out or free."""
        return sum(chunk.numel() for chunk in self._chunks)

    def like(self, tensor: Tensor) -> Tensor:
        """An empty tensor such as `tensor`, which is contiguous, in this memory."""
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            raise NotRecorded("an empty tensor that isn't contiguous, or not on the CPU")
        if tensor.numel() == 0:
            return tensor
        place = self._take(tensor.nbytes)
        view = self._chunks[place].numpy().data[: tensor.nbytes]
        weakref.finalize(view, self._give_back, place).atexit = False
        return torch.frombuffer(view, dtype=tensor.dtype).view(tensor.shape)

    def _take(self, num_bytes: int) -> int:
        i = bisect_left(self._free, (num_bytes, 0))
        if i < len(self._free):
            return self._free.pop(i)[1]
        self._chunks.append(torch.empty(num_bytes, dtype=torch.uint8))
        return len(self._chunks) - 1

    def _give_back(self, place: int) -> None:
        insort(self._free, (self._chunks[place].numel(), place))
