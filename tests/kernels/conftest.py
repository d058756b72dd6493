"""The Triton kernels on a card where there is one, else in Triton's interpreter on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def device() -> str:
    return DEVICE


@pytest.fixture(scope="session")
def kernels() -> Any:
    """The ops in Triton, by name; `reference` says what each must give."""
    reason = "triton isn't installed: pip install triton"
    triton = pytest.importorskip("triton", reason=reason)
    from mm_engine_kernels import ops

    if DEVICE == "cpu":
        # Its own functions, too, are kernels, made when it was first imported.
        interpreted = type(triton.language.sum).__name__ == "InterpretedFunction"
        assert interpreted, "triton was imported before tests/conftest.py set TRITON_INTERPRET"
    return ops.LOADERS["triton"](DEVICE)[1]
