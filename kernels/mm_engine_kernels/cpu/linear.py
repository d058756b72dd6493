"""A linear layer whose weight is laid out once for the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mm_engine_kernels import _cpu
from mm_engine_kernels.cpu.extension import DTYPES, address, check, rows_of


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """The weight of a linear layer `[rows, columns]`, in the kernels' layout.

    The layout is the same for every instruction set.
    """

    data: Tensor  # [bytes]
    rows: int
    columns: int
    dtype: torch.dtype

    def __call__(
        self, x: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """`x @ weight.T + bias + residual`: `[..., columns]` to `[..., rows]`, x's dtype.

        `bias` is `[rows]`, `residual` is shaped like the result; sums are of float32.

        Raises:
            ValueError: a shape or dtype doesn't fit the weight's.
        """
        if x.dtype != self.dtype or x.shape[-1] != self.columns:
            raise ValueError(
                f"x must be {self.dtype} of {self.columns} columns, not {x.dtype} of shape "
                f"{list(x.shape)}."
            )
        flat = x if x.dim() == 2 else x.reshape(-1, self.columns)
        flat = rows_of(flat)
        num = flat.shape[0]
        out = torch.empty((num, self.rows), dtype=self.dtype)
        if bias is not None:
            check("bias", bias, (self.rows,), self.dtype)
            bias = bias.contiguous()
        if residual is not None:
            check("residual", residual, (*x.shape[:-1], self.rows), self.dtype)
            residual = residual.reshape(num, self.rows).contiguous()
        _cpu.linear(
            flat.data_ptr(),
            self.data.data_ptr(),
            address(bias),
            address(residual),
            out.data_ptr(),
            num,
            self.rows,
            self.columns,
            flat.stride(0),
            self.rows,
            DTYPES[self.dtype],
        )
        return out if x.dim() == 2 else out.view(*x.shape[:-1], self.rows)

    def refill(self, weight: Tensor) -> None:
        """See `reference.Packed`."""
        check("weight", weight, (self.rows, self.columns), self.dtype)
        weight = rows_of(weight)
        kind = DTYPES[self.dtype]
        where = self.data.data_ptr()
        _cpu.pack(weight.data_ptr(), weight.stride(0), self.rows, self.columns, kind, where)

    @property
    def nbytes(self) -> int:
        """Of memory that the weight takes."""
        return self.data.nbytes

    def weight(self) -> Tensor:
        """The weight as it was, `[rows, columns]`."""
        return self.weight_rows(torch.arange(self.rows))

    def weight_rows(self, rows: Tensor) -> Tensor:
        """See `reference.Packed`."""
        if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < self.rows:
            raise IndexError(f"rows must be from 0 to {self.rows - 1}.")
        out = torch.empty((rows.numel(), self.columns), dtype=self.dtype)
        rows = rows.to(torch.int64).contiguous()
        _cpu.unpack_rows(
            self.data.data_ptr(),
            self.rows,
            self.columns,
            DTYPES[self.dtype],
            rows.data_ptr(),
            rows.numel(),
            out.data_ptr(),
        )
        return out


def pack_linear(weight: Tensor, *, in_place: bool = False) -> PackedLinear | None:
    """`weight` `[N, K]` in the kernels' layout; None if they don't take its dtype.

    With `in_place` the weight is given up: where the layout takes as much, it lies in its memory.
    """
    if weight.dtype not in DTYPES:
        return None
    rows, columns = weight.shape
    weight = rows_of(weight)
    dtype = DTYPES[weight.dtype]
    size = _cpu.packed_size(rows, columns, dtype)
    if in_place and size == weight.nbytes and weight.is_contiguous():
        data = weight.detach().view(-1).view(torch.uint8)
    else:
        data = torch.empty(size, dtype=torch.uint8)
    packed = PackedLinear(data, rows, columns, weight.dtype)
    packed.refill(weight)
    return packed
