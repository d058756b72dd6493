"""What the checks found: results, the report that people read, and its JSON."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mm_engine.plugins.printable import printable, to_json

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["passed", "failed", "skipped"]
MARKS: dict[Status, tuple[str, str]] = {
    "passed": ("✓", "green"),
    "failed": ("✗", "bold red"),
    "skipped": ("–", "yellow"),
}


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What one check came to. The fields after `status` say what went wrong, where they can."""

    name: str
    status: Status
    hook: str | None = None  # the hook, or the method of the model, that is wrong
    place: str | None = None  # where it is written: `mm_foo/plugin.py:42`
    expected: str | None = None
    got: str | None = None
    hint: str | None = None  # what to look at
    detail: str = ""  # of a pass: what was checked; of a skip: why
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class CheckReport:
    """The results of all checks of one plugin, in the order in which they ran."""

    plugin: str  # distribution and version
    architecture: str
    checkpoint: str | None  # the folder that the plugin was checked with; None: it has none
    results: tuple[CheckResult, ...]
    seconds: float = 0.0  # that it took, checks that were only needed and aren't listed included

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return not self.failures

    @property
    def failures(self) -> tuple[CheckResult, ...]:
        """The checks that failed."""
        return tuple(result for result in self.results if result.status == "failed")

    def to_json(self) -> str:
        """The report as a JSON object, with `passed` and the results as a list."""
        content: dict[str, Any] = dataclasses.asdict(self)
        for result in (content, *content["results"]):
            result["seconds"] = round(result["seconds"], 3)
        return to_json({"passed": self.passed, **content})

    def render(self, console: Console) -> None:
        """Print one line for each check, then a block for each failure."""
        from rich.text import Text

        console.print(Text.assemble((printable(self.plugin), "bold"), f" · {self.architecture}"))
        console.print(Text(f"checked with {self.checkpoint or 'no checkpoint'}", "dim"))
        console.print()
        width = max((len(result.name) for result in self.results), default=0)
        for result in self.results:
            mark, style = MARKS[result.status]
            said = result.detail if result.status != "failed" else f"{result.hook or 'see below'}"
            line = Text.assemble(
                "  ", (mark, style), f" {result.name:{width}}  ", (printable(said), "dim")
            )
            console.print(line, soft_wrap=True)
        for result in self.failures:
            console.print()
            console.print(render_failure(result), soft_wrap=True)
        console.print()
        console.print(self.summary())

    def summary(self) -> Any:
        """The last line: how many checks passed, failed and were skipped, in how long."""
        from rich.text import Text

        parts: list[str | tuple[str, str]] = []
        for status, (_, style) in MARKS.items():
            number = sum(result.status == status for result in self.results)
            if number or status == "passed":
                parts += [(f"{number} {status}", style), ", "]
        return Text.assemble(*parts[:-1], f" in {self.seconds:.1f} s")


def render_failure(result: CheckResult) -> Any:
    """A failure's block, as rich text: hook, place, expected, got, and what to look at."""
    from rich.text import Text

    mark, style = MARKS["failed"]
    text = Text.assemble((f"{mark} {result.name}", style))
    if result.hook:
        text.append(f" · {printable(result.hook)}", "bold")
    if result.place:
        text.append(f" ({printable(result.place)})")
    rows = (("expected", result.expected), ("got", result.got), ("look at", result.hint))
    for name, value in rows:
        if value:
            text.append(f"\n    {name:<9} ", "dim").append(printable(value))
    return text
