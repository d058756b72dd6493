"""What mm-engine expects of every plugin, one test for each of its checks."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.mm_engine_plugin("mm-internvl")
def test_contract(plugin_check: Callable[[], None]) -> None:
    plugin_check()
