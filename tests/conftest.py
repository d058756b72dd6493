"""For all tests: nothing is fetched from the Hub, and a busy machine fails no property test."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from mm_engine_kernels import ops

from interpreting import take_bounds_as_scalars

# A shell's background jobs ignore Ctrl-C, and their children do; some tests are about it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# The log is read as people read it; off a terminal it would be JSON. Tests of that ask for it.
os.environ["MM_ENGINE_LOG_FORMAT"] = "text"

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported, which reads it once

# Before anything imports triton, which reads it then: without a card its kernels run in Python.
# They are reached only by tests of them; the engine doesn't prefer them on a CPU.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
    take_bounds_as_scalars()

SPEED = "MM_ENGINE_TEST_LOOP_SECONDS"  # so that all processes of a run agree
#: From twice the time on of a machine on which the whole suite takes a quarter of an hour.
SLOW_LOOP = 0.045

settings.register_profile("repository", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repository")


@pytest.fixture(scope="session")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random-weight checkpoint in float32 that no test may change."""
    from checkpoints import make_llava  # here: it imports transformers

    return make_llava(tmp_path_factory.mktemp("llava"))


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--tensor-parallel-size 2` runs every engine of the tests as so many processes, and
    `--reference-kernels` as if the C++ ones weren't built."""
    parser.addoption("--tensor-parallel-size", type=int, default=1, metavar="N")
    parser.addoption("--reference-kernels", action="store_true")
    parser.addoption("--long", action="store_true", help="run long tests on slow machines, too")


def pytest_configure(config: pytest.Config) -> None:
    """What `--reference-kernels` asks for, before anything asks which there are.

    And how fast this machine is, before other processes of the tests make it slower.
    """
    os.environ.setdefault(SPEED, str(_loop_seconds()))
    if config.getoption("--reference-kernels"):
        ops.use("cpu", "reference")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked as long where that would take the suite over its time."""
    seconds = float(os.environ[SPEED])
    if seconds <= SLOW_LOOP or config.getoption("--long"):
        return
    reason = f"long, and this machine is slow ({1000 * seconds:.0f} ms a loop): --long runs it"
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason=reason))


def _loop_seconds() -> float:
    """What a million rounds of a loop take, at best of seven."""
    best = float("inf")
    for _ in range(7):
        start, total = time.perf_counter(), 0
        for i in range(1_000_000):
            total += i & 7
        best = min(best, time.perf_counter() - start)
    return best


@pytest.fixture
def reference_kernels() -> Iterator[None]:
    """Kernels as if the C++ ones weren't built: weights stay as they were loaded."""
    before = ops.chosen("cpu").name
    ops.use("cpu", "reference")
    yield
    ops.use("cpu", before)


@pytest.fixture(scope="session")
def forked_ranks() -> Iterator[None]:
    """Ranks start in no time: they are forked from a process that has imported everything."""
    from zygote import forking

    with forking():
        yield


@pytest.fixture(scope="session", autouse=True)
def every_engine_is_parallel(request: pytest.FixtureRequest) -> Iterator[None]:
    """What `--tensor-parallel-size` asks for."""
    size = request.config.getoption("--tensor-parallel-size")
    if size == 1:
        yield
        return
    from mm_engine.config import EngineConfig

    request.getfixturevalue("forked_ranks")
    defaults = EngineConfig.__init__.__kwdefaults__
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(defaults, "tensor_parallel_size", size)
        yield
