"""Which backend computes attention: decided once, at startup, and said in one line of the log."""

from __future__ import annotations

import logging

import torch

from mm_engine.attention.backend import Attention, AttentionBackend, Needs, block_size_of
from mm_engine.attention.cpu_paged import CpuAttention
from mm_engine.attention.flash_attn import FlashAttention
from mm_engine.attention.probe import fault_of
from mm_engine.attention.torch_sdpa import TorchAttention
from mm_engine.attention.torch_varlen import VarlenAttention
from mm_engine.attention.triton_paged import TritonAttention
from mm_engine.config import backend_name
from mm_engine.errors import StartupError

logger = logging.getLogger(__name__)

#: All that can be named.
BACKENDS: tuple[type[AttentionBackend], ...] = (
    FlashAttention,
    TritonAttention,
    VarlenAttention,
    CpuAttention,
    TorchAttention,
)
#: Those that auto tries on a CPU and elsewhere, best first. varlen stands behind Triton since it
#: doesn't split the context of a decode among the card's processors. Triton runs on a CPU under its
#: interpreter, and is no better a choice for that.
ON_CPU: tuple[type[AttentionBackend], ...] = (CpuAttention, TorchAttention)
ON_CARD = tuple(backend for backend in BACKENDS if backend is not CpuAttention)


def needs_of(
    layers: list[Attention],
    device: torch.device,
    dtype: torch.dtype,
    *,
    kv_dtype: torch.dtype | None = None,
    block_size: int = 16,
) -> Needs:
    """What these layers on this device ask for; the cache is of `dtype` unless `kv_dtype` says."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return Needs(layers, device, dtype, kv_dtype or dtype, block_size, capability)


def choose(name: str, needs: Needs) -> AttentionBackend:
    """The backend called `name`, or for auto the first that can serve `needs`.

    Raises:
        StartupError: no backend is called so, or this one can't serve; says why.
    """
    name = backend_name(name)
    auto = ON_CPU if needs.device.type == "cpu" else ON_CARD
    candidates = auto if name == "auto" else [one for one in BACKENDS if one.name == name]
    reasons: list[str] = []
    for backend in candidates:
        reason = backend.unfit(needs)
        if reason is None:
            made = backend()
            reason = fault_of(made, needs)
            if reason is None:
                return _say(made, needs, "; ".join(reasons) if name == "auto" else "as asked")
        reasons.append(f"{backend.name} {reason}")
    raise StartupError(
        f"attention backend can't serve this model here: {'; '.join(reasons)}. "
        "Change that, or use auto."
    )


def _say(backend: AttentionBackend, needs: Needs, why: str) -> AttentionBackend:
    label = f"{backend.name} {backend.version}".rstrip()
    size = block_size_of(backend, needs.block_size)
    if size != needs.block_size:
        label += f", blocks of {size} tokens"
    logger.info("Attention: %s", f"{label} ({why})" if why else label)
    return backend
