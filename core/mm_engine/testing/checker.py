"""Running the checks: in order, each once, and none of them can end the run."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence

from mm_engine.errors import PluginError
from mm_engine.plugins.blame import with_time_limit
from mm_engine.testing.fault import Skip, fault_of
from mm_engine.testing.registry import CHECKS, FUNCTIONS, UNLESS_FAILED
from mm_engine.testing.report import CheckReport, CheckResult
from mm_engine.testing.subject import Subject
from mm_engine.testing.target import Target

CHECK_TIMEOUT = 3600.0  # seconds; a large model's checks on a CPU take long, a loop for ever
#: Where the checks are; importing them fills `FUNCTIONS`.
MODULES = ("start", "inputs", "counts", "model", "same", "parity")


class Checker:
    """The checks of one plugin with one checkpoint; what several checks need is made once."""

    def __init__(self, target: Target) -> None:
        for module in MODULES:
            importlib.import_module(f"mm_engine.testing.checks_{module}")
        self.subject = Subject(target)
        self.results: dict[str, CheckResult] = {}
        self._causes: dict[str, str] = {}  # of a skipped check, the failed one that is to blame

    def run(
        self, only: Sequence[str] = (), on_start: Callable[[str], object] | None = None
    ) -> CheckReport:
        """Run all checks, or those of `only` and the ones that they need.

        A check that was only needed is in the report if it failed.
        """
        start = time.perf_counter()
        for name in only or CHECKS:
            self.result(name, on_start)
        shown = [
            result
            for name in CHECKS
            if (result := self.results.get(name)) is not None
            and (not only or name in only or result.status == "failed")
        ]
        target = self.subject.target
        folder = str(target.folder) if target.folder is not None else None
        if folder is not None and target.is_config:
            folder = f"random weights for {folder}"
        record = target.record
        seconds = time.perf_counter() - start
        return CheckReport(record.label, record.architecture, folder, tuple(shown), seconds)

    def result(self, name: str, on_start: Callable[[str], object] | None = None) -> CheckResult:
        """The result of one check, which runs now unless it has run."""
        if name not in self.results:
            cause = self._obstacle(name, on_start)
            if cause is not None:
                self._causes[name] = cause
                result = CheckResult(name, "skipped", detail=f"because {cause} failed")
            else:
                if on_start is not None:
                    on_start(name)
                result = self._run(name)
            self.results[name] = result
        return self.results[name]

    def _obstacle(self, name: str, on_start: Callable[[str], object] | None) -> str | None:
        """The failed check because of which this one means nothing; what it needs runs first."""
        for needed in CHECKS[name]:
            failed = self.result(needed, on_start).status == "failed"
            cause = needed if failed else self._causes.get(needed)
            if cause is not None:
                return cause
        other = UNLESS_FAILED.get(name)
        if other is not None and self.result(other, on_start).status == "failed":
            return other
        return None

    def _run(self, name: str) -> CheckResult:
        start = time.perf_counter()

        def outcome() -> str | BaseException:
            try:
                return FUNCTIONS[name](self.subject)
            except BaseException as error:  # a plugin may raise anything, SystemExit too
                return error

        # In a thread of its own, where no Ctrl-C arrives: there it is the plugin's.
        found: str | BaseException
        try:
            found = with_time_limit(outcome, CHECK_TIMEOUT, f"the check {name}")
        except PluginError as error:  # the time limit's
            found = error
        seconds = time.perf_counter() - start
        if isinstance(found, str):
            return CheckResult(name, "passed", detail=found, seconds=seconds)
        if isinstance(found, Skip):
            return CheckResult(name, "skipped", detail=str(found), seconds=seconds)
        fault = fault_of(found)
        said = (fault.hook, fault.place, fault.expected, fault.got, fault.hint or None)
        return CheckResult(name, "failed", *said, seconds=seconds)
