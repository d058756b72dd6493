"""For all tests: nothing is fetched from the Hub, and a busy machine fails no property test."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# A shell's background jobs ignore Ctrl-C, and their children do; some tests are about it.
signal.signal(signal.SIGINT, signal.default_int_handler)

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once

# Before anything imports triton, which reads it then: without a card its kernels run in Python.
# They are reached only by tests of them; the engine doesn't prefer them on a CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("repository", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repository")


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight checkpoint in float32 that no test may change."""
    from checkpoints import make_llava  # here: it imports transformers

    return make_llava(tmp_path_factory.mktemp("llava"))
