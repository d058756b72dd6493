"""The C++ kernels, with each instruction set that this CPU has and several numbers of threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

try:
    from mm_engine_kernels.cpu import extension
except ImportError:
    collect_ignore_glob = ["test_*.py"]
    ISAS = []
else:
    ISAS = extension.isas()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what is left out: a module that can't be imported can't skip by itself."""
    if not ISAS:
        terminalreporter.write_line("tests/cpu_kernels is left out: the C++ kernels aren't built")


@pytest.fixture(params=ISAS, scope="module")
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set, in use."""
    before = extension.isa()
    extension.use_isa(request.param)
    yield request.param
    extension.use_isa(before)


@pytest.fixture(params=[1, 2, 5], ids="threads{}".format, scope="module")
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    """So many threads: one, some, and more than there may be cores."""
    before = extension.num_threads()
    extension.set_num_threads(request.param)
    yield request.param
    extension.set_num_threads(before)
