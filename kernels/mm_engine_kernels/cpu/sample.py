"""Drawing a token from each row, cut by top-k, top-p and min-p, without sorting the vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor

from mm_engine_kernels import _cpu, reference
from mm_engine_kernels.cpu.extension import address, rows_of


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    *,
    kept: Tensor | None = None,
) -> Tensor:
    """`reference.sample`, up to the rounding of its sums. A row without a distribution draws 0.

    `kept` `[N, V]` float32 is for tests: it gets the weights that are kept, and zeros.

    Floor: an exponential of each logit. A row is one thread's. A cut by top-k or top-p costs some
    three passes over the row's weights, the later ones being over the few that are left in doubt.
    """
    num, size = logits.shape
    if logits.dtype != torch.float32 or size == 0 or size >= 1 << 31:
        return reference.sample(logits, uniform, temperature, top_k, top_p, min_p)
    logits = rows_of(logits)
    uniform, top_k = _column(uniform, torch.float64, num), _column(top_k, torch.int64, num)
    temperature, top_p, min_p = (
        _column(values, torch.float32, num) for values in (temperature, top_p, min_p)
    )
    assert kept is None or (kept.shape == logits.shape and kept.is_contiguous())
    sampled = torch.empty(num, dtype=torch.int64)
    _cpu.sample(
        logits.data_ptr(),
        uniform.data_ptr(),
        temperature.data_ptr(),
        top_k.data_ptr(),
        top_p.data_ptr(),
        min_p.data_ptr(),
        sampled.data_ptr(),
        address(kept),
        num,
        size,
        logits.stride(0),
    )
    return sampled


def _column(values: Tensor, dtype: torch.dtype, num: int) -> Tensor:
    """`values` `[num]` in the dtype that the kernel reads.

    Raises:
        ValueError: they are not one for each row.
    """
    if values.shape != (num,):
        raise ValueError(f"one value is needed for each of {num} rows, not {list(values.shape)}.")
    return values.to(dtype).contiguous()
