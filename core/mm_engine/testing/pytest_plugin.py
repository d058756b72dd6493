"""The pytest fixture `plugin_check`: one test for each check of a plugin.

pytest loads this module in every run where mm-engine is installed, so it imports nothing heavy;
torch and the plugin come in when the first check runs.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from mm_engine.testing.checker import Checker

MARK = "mm_engine_plugin"
CHECKERS = pytest.StashKey[dict[tuple[str, str | None], "Checker"]]()


def pytest_configure(config: pytest.Config) -> None:
    """Make the mark known."""
    config.addinivalue_line(
        "markers",
        f"{MARK}(plugin, model=None): the plugin that the fixture plugin_check checks: a "
        "distribution, an architecture or a file, and a checkpoint to check it with",
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test of each check."""
    if "plugin_check" in metafunc.fixturenames:
        from mm_engine.testing.registry import CHECKS

        metafunc.parametrize("plugin_check", list(CHECKS), indirect=True)


@pytest.fixture
def plugin_check(request: pytest.FixtureRequest) -> Callable[[], None]:
    """Run one check of the plugin that the mark `mm_engine_plugin` names, and fail if it failed.

    Call it without arguments. All tests of a session share what the checks need, such as the
    loaded model.
    """
    mark = request.node.get_closest_marker(MARK)
    if mark is None or not (mark.args or mark.kwargs):
        pytest.fail(
            f'plugin_check needs to know the plugin: mark the test with @pytest.mark.{MARK}("…")',
            pytrace=False,
        )
    plugin, model = _arguments(*mark.args, **mark.kwargs)
    name: str = request.param

    def run() -> None:
        checkers = request.config.stash.setdefault(CHECKERS, {})
        if (plugin, model) not in checkers:
            from mm_engine.testing.target import find_target

            target = find_target(plugin, model)
            from mm_engine.testing.checker import Checker  # after: it imports torch

            checkers[plugin, model] = Checker(target)
        result = checkers[plugin, model].result(name)
        if result.status == "skipped":
            pytest.skip(f"{name}: {result.detail}")
        if result.status == "failed":
            from rich.console import Console

            from mm_engine.testing.report import render_failure

            page = io.StringIO()
            Console(file=page, width=100, soft_wrap=True).print(render_failure(result))
            pytest.fail(page.getvalue(), pytrace=False)

    return run


def _arguments(plugin: str, model: str | None = None) -> tuple[str, str | None]:
    return str(plugin), None if model is None else str(model)
