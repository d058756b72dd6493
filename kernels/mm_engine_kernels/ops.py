"""The ops that models and the worker call, each handed to the kernels of its tensors' device.

Which kernels those are is decided once for each type of device, when it is first met: the first
of `PREFERRED` that can be imported. `reference` says what each op means.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mm_engine_kernels import reference

#: What is tried for each type of device, best first.
PREFERRED: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "reference"),
    "cuda": ("triton", "reference"),
}

#: The file in triton/ of each op that has a kernel there.
TRITON_FILES = {
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "rotary": "rotary",
    "silu_mul": "silu_mul",
    "write_kv": "write_kv",
    "paged_decode": "paged_decode",
    "paged_prefill": "paged_prefill",
    "merge_by_position": "merge_by_position",
    "sample": "sample",
}

#: The file in cpu/ of each op that has a kernel there.
CPU_FILES: dict[str, str] = {
    "pack_linear": "linear",
    "quantize_linear": "quantized",
    "linear_quantized": "quantized",
    "rms_norm": "rms_norm",
    "add_rms_norm": "rms_norm",
    "silu_mul": "silu_mul",
    "rotary": "rotary",
    "write_kv": "write_kv",
    "merge_by_position": "merge_by_position",
    "gather_rows": "gather_rows",
    "argmax": "largest",
    "amax": "largest",
    "sample": "sample",
    "paged_attention": "paged_attention",
    "full_attention": "full_attention",
}


class Unavailable(Exception):
    """Kernels can't run here; the message says why, and what would help."""


@dataclass(frozen=True)
class Chosen:
    """The kernels that one type of device runs."""

    name: str
    version: str  # of what they are written in
    why_not: tuple[str, ...]  # one line for each that was preferred and can't run

    def __str__(self) -> str:
        return "; ".join((f"{self.name} {self.version}", *self.why_not))


def _reference(device_type: str) -> tuple[str, ModuleType]:
    return f"(torch {torch.__version__})", reference


def _triton(device_type: str) -> tuple[str, SimpleNamespace]:
    try:
        import triton

        from mm_engine_kernels.triton.device import INTERPRETED
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise Unavailable(f"triton can't be imported: {error}") from error
        raise Unavailable("triton isn't installed: pip install 'mm-engine[cuda]'") from None
    except Exception as error:
        first_line = str(error).partition("\n")[0]
        fact = f"triton can't be imported: {type(error).__name__}: {first_line}"
        raise Unavailable(fact) from error
    if device_type != "cuda" and not INTERPRETED:
        raise Unavailable(
            f"triton doesn't run on {device_type}: set TRITON_INTERPRET=1 to test its kernels"
        )
    return triton.__version__, _from_files("triton", TRITON_FILES)


def _cpp(device_type: str) -> tuple[str, SimpleNamespace]:
    try:
        from mm_engine_kernels.cpu import extension
    except ImportError as error:
        remedy = (
            "install a wheel of mm-engine-kernels for this platform, or a C++20 compiler and then "
            "pip install --force-reinstall --no-deps mm-engine-kernels"
        )
        raise Unavailable(f"{error}: {remedy}") from error
    return f"({extension.isa()})", _from_files("cpu", CPU_FILES)


def _from_files(folder: str, files: dict[str, str]) -> SimpleNamespace:
    """The ops of a folder; those that have no file there are the reference's."""
    kernels = SimpleNamespace(**{name: getattr(reference, name) for name in OPS})
    for name, file in files.items():
        module = importlib.import_module(f"mm_engine_kernels.{folder}.{file}")
        setattr(kernels, name, getattr(module, name))
    return kernels


LOADERS: dict[str, Callable[[str], tuple[str, Any]]] = {
    "reference": _reference,
    "cpp": _cpp,
    "triton": _triton,
}

_chosen: dict[str, Chosen] = {}


class _Kernels(dict[str, Any]):
    """The kernels by type of device; a type that wasn't met before gets its own."""

    def __missing__(self, device_type: str) -> Any:
        why_not: list[str] = []
        for name in PREFERRED.get(device_type, ("reference",)):
            try:
                return self.take(device_type, name, tuple(why_not))
            except Unavailable as error:
                why_not.append(str(error))
        raise AssertionError("the reference runs everywhere")

    def take(self, device_type: str, name: str, why_not: tuple[str, ...] = ()) -> Any:
        version, kernels = LOADERS[name](device_type)
        self[device_type] = kernels
        _chosen[device_type] = Chosen(name, version, why_not)
        return kernels


_kernels = _Kernels()


def use(device_type: str, name: str) -> None:
    """Let `device_type` run the kernels `name`, whatever would be preferred.

    Raises:
        ValueError: there are no kernels of this name.
        Unavailable: they can't run here.
    """
    if name not in LOADERS:
        raise ValueError(f"kernels are not known: {name}. Use one of: {', '.join(LOADERS)}.")
    _kernels.take(device_type, name)


def chosen(device_type: str) -> Chosen:
    """Which kernels `device_type` runs, and why none that would be preferred."""
    _kernels[device_type]
    return _chosen[device_type]


def set_num_threads(count: int) -> None:
    """Let PyTorch and the CPU's kernels take so many threads from now on."""
    torch.set_num_threads(count)
    if chosen("cpu").name == "cpp":
        from mm_engine_kernels.cpu import extension

        extension.set_num_threads(count)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`reference.linear`: PyTorch's own everywhere."""
    return torch.nn.functional.linear(x, weight, bias)


def pack_linear(weight: Tensor, *, in_place: bool = False) -> reference.Packed | None:
    """See `reference.pack_linear`."""
    packed: reference.Packed | None = _kernels[weight.device.type].pack_linear(
        weight, in_place=in_place
    )
    return packed


def quantize_linear(weight: Tensor, bits: int) -> tuple[Tensor, Tensor] | None:
    """See `reference.quantize_linear`."""
    made: tuple[Tensor, Tensor] | None = _kernels[weight.device.type].quantize_linear(weight, bits)
    return made


def linear_quantized(
    x: Tensor, data: Tensor, scales: Tensor, rows: int, bits: int, bias: Tensor | None = None
) -> Tensor:
    """`x` `[M, K]` by what `quantize_linear` made of a weight of so many rows: `[M, rows]`."""
    product: Tensor = _kernels[x.device.type].linear_quantized(x, data, scales, rows, bits, bias)
    return product


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `reference.rms_norm`."""
    return _kernels[x.device.type].rms_norm(x, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """See `reference.add_rms_norm`."""
    return _kernels[x.device.type].add_rms_norm(x, residual, weight, eps)


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """See `reference.rotary`."""
    return _kernels[x.device.type].rotary(x, cos, sin)


def silu_mul(gate_up: Tensor) -> Tensor:
    """See `reference.silu_mul`."""
    return _kernels[gate_up.device.type].silu_mul(gate_up)


def write_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """See `reference.write_kv`."""
    _kernels[key.device.type].write_kv(key, value, key_cache, value_cache, slot_mapping)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_lens: list[int],
    context_lens: list[int],
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """See `reference.paged_attention`."""
    return _kernels[query.device.type].paged_attention(
        query,
        key_cache,
        value_cache,
        block_tables,
        query_lens,
        context_lens,
        scale,
        sliding_window,
        softcap,
    )


def paged_decode(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    max_context_len: int,
    num_splits: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.paged_decode`."""
    return _kernels[query.device.type].paged_decode(
        query,
        key_cache,
        value_cache,
        block_tables,
        context_lens,
        scale,
        sliding_window,
        softcap,
        max_context_len=max_context_len,
        num_splits=num_splits,
        out=out,
    )


def paged_prefill(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_starts: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    *,
    max_query_len: int,
    out: Tensor | None = None,
) -> Tensor:
    """See `reference.paged_prefill`."""
    return _kernels[query.device.type].paged_prefill(
        query,
        key_cache,
        value_cache,
        block_tables,
        query_starts,
        context_lens,
        scale,
        sliding_window,
        softcap,
        max_query_len=max_query_len,
        out=out,
    )


def full_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """See `reference.full_attention`."""
    return _kernels[query.device.type].full_attention(query, key, value, scale)


def merge_by_position(embeddings: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """See `reference.merge_by_position`."""
    return _kernels[embeddings.device.type].merge_by_position(embeddings, rows, positions)


def gather_rows(table: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """See `reference.gather_rows`."""
    return _kernels[table.device.type].gather_rows(table, rows, dtype)


def argmax(x: Tensor) -> Tensor:
    """See `reference.argmax`."""
    return _kernels[x.device.type].argmax(x)


def amax(x: Tensor) -> Tensor:
    """See `reference.amax`."""
    return _kernels[x.device.type].amax(x)


def sample(
    logits: Tensor,
    uniform: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
) -> Tensor:
    """See `reference.sample`."""
    return _kernels[logits.device.type].sample(logits, uniform, temperature, top_k, top_p, min_p)


OPS = (
    "pack_linear",
    "quantize_linear",
    "rms_norm",
    "add_rms_norm",
    "rotary",
    "silu_mul",
    "write_kv",
    "paged_attention",
    "paged_decode",
    "paged_prefill",
    "full_attention",
    "merge_by_position",
    "gather_rows",
    "argmax",
    "amax",
    "sample",
)
