"""The fixture `plugin_check`, in a test suite of its own, as a plugin's author uses it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mm_engine.testing.registry import CHECKS
from wrong_plugins import WRONG_PLUGINS

pytest_plugins = ["pytester"]

CONTRACT = """
import pytest
@pytest.mark.mm_engine_plugin({plugin!r}, model={model!r})
def test_contract(plugin_check): plugin_check()
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    """Run pytest in a process of its own, strict about marks and warnings."""
    return pytester.runpytest_subprocess(
        "--strict-markers", "-W", "error", "-p", "no:cacheprovider", *arguments
    )


def test_three_lines_make_a_test_of_each_check(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(CONTRACT.format(plugin="mm-llava", model=None))
    listed = run(pytester, "--collect-only", "-q")
    listed.stdout.fnmatch_lines_random([f"*::test_contract[[]{name}]" for name in CHECKS])
    result = run(pytester, "-k", "hooks-fit or placeholder-text or mapper-keys")
    result.assert_outcomes(passed=3, deselected=len(CHECKS) - 3)


def test_failure_shows_the_block_of_the_report_and_no_traceback(
    pytester: pytest.Pytester, llava: Path
) -> None:
    file = WRONG_PLUGINS["rows-too-narrow"].write(pytester.path)
    pytester.makepyfile(CONTRACT.format(plugin=str(file), model=str(llava)))
    result = run(pytester, "-k", "encoder-output or same-in-batch")
    result.assert_outcomes(failed=1, skipped=1, deselected=len(CHECKS) - 2)
    result.stdout.fnmatch_lines(
        [
            "✗ encoder-output · embed_images (rows_too_narrow.py:*)",
            "    expected  a tensor [[]num_tokens, 64] for an image of 32x32 pixels",
            "    got       Tensor (float32, [[]16, 63])",
        ]
    )
    result.stdout.no_fnmatch_line("*Traceback*")


def test_without_the_mark_the_test_says_what_is_missing(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("def test_contract(plugin_check): plugin_check()")
    result = run(pytester, "-k", "hooks-fit")
    result.assert_outcomes(errors=1, deselected=len(CHECKS) - 1)
    result.stdout.fnmatch_lines(["*mark the test with @pytest.mark.mm_engine_plugin*"])


def test_unknown_plugin_fails_the_tests(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(CONTRACT.format(plugin="mm-nothing", model=None))
    result = run(pytester, "-k", "hooks-fit")
    result.assert_outcomes(failed=1, deselected=len(CHECKS) - 1)
    result.stdout.fnmatch_lines(["*no such plugin is installed: mm-nothing*"])


def test_pytest_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, mm_engine.testing.pytest_plugin; "
        "print({'torch', 'transformers', 'PIL', 'rich'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
