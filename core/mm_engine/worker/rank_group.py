"""What the processes of a tensor-parallel model compute together: sums, gathers, broadcasts."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class RankGroup:
    """The processes that hold the parts of one model: gloo on CPUs, NCCL on GPUs.

    A group of its own, not PyTorch's default one: a program may have several engines, and may use
    the default one itself. All processes make the same calls in the same order.
    """

    def __init__(
        self, device: torch.device, rank: int, size: int, store: Path, timeout: float
    ) -> None:
        """Join the others; returns when all are there. `timeout` (seconds) is one call's limit.

        Raises:
            RuntimeError: they didn't come, or this build of PyTorch has no such backend.
        """
        dist: Any = torch.distributed
        self.size = size
        self.num_calls = 0  # equal in all processes, or they have come apart
        limit = timedelta(seconds=timeout)
        shared = dist.FileStore(str(store), size)
        self._backend: Any
        if device.type == "cuda":
            # NCCL's own watchdog would end the process without a word when `abort` lets go.
            os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = limit
            self._backend = dist.ProcessGroupNCCL(shared, rank, size, options)
        else:
            options = dist.ProcessGroupGloo._Options()
            options._timeout = limit
            # Nobody else's business: gloo would listen at the address of the machine's name.
            options._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self._backend = dist.ProcessGroupGloo(shared, rank, size, options)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of the processes' `x`, which it overwrites."""
        self.num_calls += 1
        x = x.contiguous()
        self._backend.allreduce([x]).wait()
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """`[size, *x.shape]`: every process's `x`, by rank."""
        self.num_calls += 1
        out = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        self._backend._allgather_base(out, x.contiguous()).wait()
        return out.view(self.size, *x.shape)

    def broadcast(self, x: Tensor) -> Tensor:
        """Rank 0's `x`, in `x` itself."""
        self.num_calls += 1
        x = x.contiguous()
        self._backend.broadcast([x]).wait()
        return x

    def abort(self) -> None:
        """Let go of a call that waits for a process which won't come."""
        self._backend.abort()
