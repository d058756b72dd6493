"""Tensors of a card that isn't there: they say that they are on it, and are numbers of the host.

What a card would do with them is said by the `Card` that is pretended (`pretend_card`).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from pretend_card import Card

aten = torch.ops.aten
DEVICE = torch.device("cuda", 0)

#: The card that is pretended; without one its tensors can't be used.
current: ContextVar[Card] = ContextVar("card")


class CardTensor(torch.Tensor):
    """A tensor of the card; `host` holds its numbers."""

    host: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, host: Tensor) -> CardTensor:
        # A view of a weight is made in inference mode; PyTorch gives it the weight's version.
        with torch.inference_mode(False):
            made: CardTensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
                cls,
                host.size(),
                strides=host.stride(),
                storage_offset=host.storage_offset(),
                dtype=host.dtype,
                device=DEVICE,
            )
        made.host = host
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CardTensor({self.host})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return current.get().call(func, args, kwargs or {})

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    # PyTorch's own methods ask for the CUDA that it was built with.

    def contiguous(self, memory_format: torch.memory_format = torch.contiguous_format) -> Tensor:
        if self.host.is_contiguous(memory_format=memory_format):
            return self
        return self.clone(memory_format=memory_format)

    def copy_(self, source: Tensor, non_blocking: bool = False) -> Tensor:
        return current.get().copy_to(self, source, unblocked=non_blocking)

    def __invert__(self) -> Tensor:
        return self.bitwise_not()

    def nonzero(self) -> Tensor:  # type: ignore[override]
        found: Tensor = current.get().call(aten.nonzero.default, (self,), {})
        return found

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __getitem__(self, index: Any) -> Tensor:
        return current.get().get(self, index)

    def __setitem__(self, index: Any, value: Any) -> None:
        current.get().put(self, index, value)


class Dispatch(TorchDispatchMode):
    """Sees what makes tensors of the card out of nothing, or out of the host's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return current.get().call(func, args, kwargs or {})


def to_host(value: Any) -> Any:
    """The numbers of a tensor of the card; anything else as it is."""
    return value.host if isinstance(value, CardTensor) else value


def on_card(device: Any) -> bool:
    """Whether a device that something asks for is the card."""
    return device is not None and torch.device(device).type == DEVICE.type


def is_pinned(tensor: Tensor) -> bool:
    """Whether the card can copy it while the host goes on."""
    return getattr(tensor, "pretended_pinned", False)


def pin(tensor: Tensor) -> Tensor:
    """Say of a tensor of the host that it is pinned."""
    assert not isinstance(tensor, CardTensor), "only the host's memory is pinned"
    tensor.pretended_pinned = True  # type: ignore[attr-defined]
    return tensor


def spoil(tensor: Tensor) -> None:
    """Overwrite numbers that nobody may read any longer, or yet."""
    if tensor.dtype == torch.bool:
        tensor.logical_not_()
    else:
        tensor.fill_(float("nan") if tensor.is_floating_point() else -7)


def as_tensors(index: Any) -> Any:
    """An index whose lists are the tensors of the host that PyTorch makes of them."""
    if isinstance(index, list):
        return torch.tensor(index)
    return tuple(map(as_tensors, index)) if isinstance(index, tuple) else index
