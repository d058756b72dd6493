"""The C++ kernels, with each instruction set that this CPU has and several numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

extension = pytest.importorskip(
    "mm_engine_kernels.cpu.extension", reason="the C++ kernels aren't built", exc_type=ImportError
)


@pytest.fixture(params=extension.isas(), scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, in use."""
    before = extension.isa()
    extension.use_isa(request.param)
    yield request.param
    extension.use_isa(before)


@pytest.fixture(params=[1, 2, 5], ids="{} threads".format, scope="module")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads: one, some, and more than there may be cores."""
    before = extension.num_threads()
    extension.set_num_threads(request.param)
    yield request.param
    extension.set_num_threads(before)
