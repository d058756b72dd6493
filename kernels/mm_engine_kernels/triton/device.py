"""What launchers ask about the card: its capability, its size, and whether there is one at all."""

from functools import cache

import torch
import triton
from torch import Tensor

#: Kernels run in Python on CPU tensors (TRITON_INTERPRET=1 when these files were imported).
INTERPRETED = bool(triton.knobs.runtime.interpret)
NO_CARD = (0, 0)  # the capability of the interpreter


@cache
def _properties(index: int) -> tuple[tuple[int, int], int]:
    properties = torch.cuda.get_device_properties(index)
    return (properties.major, properties.minor), properties.multi_processor_count


def capability(x: Tensor) -> tuple[int, int]:
    """Compute capability of the card that holds `x`; `NO_CARD` under the interpreter."""
    return NO_CARD if x.is_cpu else _properties(x.device.index)[0]


def num_processors(x: Tensor) -> int:
    """Streaming multiprocessors of the card that holds `x`."""
    return 1 if x.is_cpu else _properties(x.device.index)[1]
