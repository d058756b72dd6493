"""For plugin authors: the contract's checks, as a function, a command and a pytest fixture.

    from mm_engine.testing import check_plugin

    report = check_plugin("mm-foo")

`engine plugins check mm-foo` prints the same report. In a plugin's own tests, three lines:

    @pytest.mark.mm_engine_plugin("mm-foo")
    def test_contract(plugin_check):
        plugin_check()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mm_engine.errors import StartupError
from mm_engine.testing.report import CheckReport, CheckResult

__all__ = ["CheckReport", "CheckResult", "check_plugin"]


def check_plugin(
    plugin: str,
    model: str | None = None,
    *,
    only: Sequence[str] = (),
    on_start: Callable[[str], object] | None = None,
) -> CheckReport:
    """Hold a plugin to the contract; every check runs, whatever became of the others.

    `plugin` is a distribution (`mm-foo`), an architecture, or a file (`./my_model.py`); `model` a
    checkpoint's folder, a Hub id or a bundled demo's name. Without it, the kit takes what the
    plugin brings: a bundled demo, or a small config from which it makes a checkpoint with random
    weights. `only` names checks; those that they need run with them. `on_start` is called with
    the name of each check as it starts.

    Raises:
        StartupError: there is no such plugin or check, or it isn't clear which one is meant.
    """
    from mm_engine.testing.registry import CHECKS
    from mm_engine.testing.target import find_target

    unknown = sorted(set(only) - CHECKS.keys())
    if unknown:
        raise StartupError(
            f"there is no such check: {', '.join(unknown)}. Choose from {', '.join(CHECKS)}."
        )
    target = find_target(plugin, model)
    from mm_engine.testing.checker import Checker  # last: it imports torch and transformers

    return Checker(target).run(only, on_start)
