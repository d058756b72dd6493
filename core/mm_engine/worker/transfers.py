"""Bringing numbers to the device and back while it goes on computing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


def to_device(values: Any, device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """A tensor of a (nested) list; nothing waits for what the device is doing.

    A copy from memory that isn't pinned would: the driver stages it behind the stream's work.
    """
    tensor = torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")
    return tensor.to(device, non_blocking=True)


def move(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device; nothing waits for what the device is doing."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def fill(target: Tensor, values: Any) -> None:
    """Write a (nested) list to `target`; nothing waits for what the device is doing."""
    tensor = torch.tensor(values, dtype=target.dtype, pin_memory=target.is_cuda)
    target.copy_(tensor, non_blocking=True)


class HostCopy:
    """A copy of a tensor that is on its way to the host; reading it waits for that copy alone.

    On a CPU it is the tensor itself: nothing may write to it before it was read.
    """

    __slots__ = ("_arrived", "_tensor")

    def __init__(self, tensor: Tensor) -> None:
        self._arrived: torch.cuda.Event | None = None
        self._tensor = tensor
        if tensor.is_cuda:
            # Pinned, or the copy would wait for all that the device has to do before it.
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._tensor = host.copy_(tensor, non_blocking=True)
            self._arrived = torch.cuda.Event()
            self._arrived.record()

    def tolist(self) -> list[Any]:
        """The numbers, nested as the shape says."""
        if self._arrived is not None:
            self._arrived.synchronize()
            self._arrived = None
        numbers: list[Any] = self._tensor.tolist()
        return numbers


@dataclass(frozen=True, slots=True)
class SampledId:
    """One of the ids that a step has sampled, which the host may not know yet."""

    on_device: Tensor  # [1] int64
    host_ids: HostCopy  # [N], of the whole step
    position: int  # in it

    def known(self) -> int:
        """The id. Waits for the step that sampled it, and for nothing that was launched since."""
        token_id: int = self.host_ids.tolist()[self.position]
        return token_id
