"""The report: one line for each check, a block for each failure, and the same as JSON."""

from __future__ import annotations

import io

from rich.console import Console

from mm_engine.errors import PluginError, StartupError
from mm_engine.testing import CheckReport, CheckResult, check_plugin
from mm_engine.testing.fault import Fault, fault_of

REPORT = CheckReport(
    "mm-foo 0.1.0",
    "FooForConditionalGeneration",
    "/models/foo",
    (
        CheckResult("hooks-fit", "passed", detail="model_class, max_tokens", seconds=0.5),
        CheckResult(
            "counts",
            "failed",
            "input_processor",
            "mm_foo/plugin.py:42",
            "576 placeholder tokens",
            "575",
            "the [formula]",
            seconds=1.0,
        ),
        CheckResult("max-tokens", "skipped", detail="because counts failed"),
    ),
    seconds=1.5,
)
RENDERED = """\
mm-foo 0.1.0 · FooForConditionalGeneration
checked with /models/foo

  ✓ hooks-fit   model_class, max_tokens
  ✗ counts      input_processor
  – max-tokens  because counts failed

✗ counts · input_processor (mm_foo/plugin.py:42)
    expected  576 placeholder tokens
    got       575
    look at   the [formula]

1 passed, 1 failed, 1 skipped in 1.5 s
"""


def rendered(report: CheckReport) -> str:
    page = io.StringIO()
    report.render(Console(file=page, width=60, highlight=False))
    return page.getvalue()


def test_report_reads_line_by_line() -> None:
    assert rendered(REPORT) == RENDERED


def test_report_without_failures_ends_with_the_number_that_passed() -> None:
    report = CheckReport("mm-foo 0.1.0", "Foo", None, REPORT.results[:1], 0.5)
    assert report.passed
    assert rendered(report).endswith("\n\n1 passed in 0.5 s\n")
    assert "checked with no checkpoint" in rendered(report)


def test_long_lines_are_not_broken_by_the_report() -> None:
    result = CheckResult("counts", "failed", expected="x" * 300, got="y")
    assert "x" * 300 in rendered(CheckReport("mm-foo 0.1.0", "Foo", None, (result,)))


def test_failures_are_those_that_failed() -> None:
    assert not REPORT.passed
    assert [result.name for result in REPORT.failures] == ["counts"]


def test_blame_of_the_engine_is_taken_apart() -> None:
    line = "mm-foo 0.1.0 · input_processor (mm_foo/plugin.py:42): expected 576, got 575."
    fault = fault_of(PluginError(line))
    assert (fault.hook, fault.place) == ("input_processor", "mm_foo/plugin.py:42")
    assert (fault.expected, fault.got) == ("576", "575")


def test_blame_for_an_exception_keeps_its_message_whole() -> None:
    line = "mm-foo 0.1.0 · embed_images (foo.py:1): raised RuntimeError: sizes differ. Got 68."
    fault = fault_of(PluginError(line))
    assert (fault.expected, fault.got) == (
        "no exception",
        "raised RuntimeError: sizes differ. Got 68",
    )


def test_remedy_of_the_engine_becomes_the_hint() -> None:
    line = "mm-foo 0.1.0 · max_token (foo.py:1): there is no such hook. Did you mean max_tokens?"
    fault = fault_of(PluginError(line))
    assert (fault.got, fault.hint) == ("there is no such hook", "Did you mean max_tokens?")


def test_refusal_without_a_hook_is_given_whole() -> None:
    fault = fault_of(StartupError("weights are missing: x. Fetch them."))
    assert fault.hook is None
    assert fault.got == "weights are missing: x. Fetch them."


def test_exception_is_placed_where_it_was_raised() -> None:
    try:
        raise KeyError("pixels")
    except KeyError as error:
        fault = fault_of(error)
    assert fault.place is not None and fault.place.startswith("test_report.py:")
    assert fault.got == "KeyError: 'pixels'"


def test_a_fault_is_what_it_is() -> None:
    fault = Fault("max_tokens", "foo.py:1", "4", "5")
    assert fault_of(fault) is fault
    assert str(fault) == "max_tokens: expected 4, got 5"


def test_time_of_checks_that_were_only_needed_counts() -> None:
    report = check_plugin("mm-llava", "llava-demo", only=["placeholder-text"])
    (result,) = report.results
    assert report.seconds > result.seconds + 0.01  # the checkpoint was opened, too
