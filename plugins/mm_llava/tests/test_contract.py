"""mm-llava keeps the contract of mm-engine's plugins."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.mark.mm_engine_plugin("mm-llava")
def test_contract(plugin_check: Callable[[], None]) -> None:
    plugin_check()
