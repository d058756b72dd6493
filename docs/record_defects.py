"""Write docs/defects.md: put defects into mm-llava-next, one at a time, and record what is said.

`make defects` runs it, half a minute. It is no part of `make docs`, for that reason; a test
puts the same defects in and holds the page to what it finds.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.progress import track

from checkpoints import make_llava_next
from defects import DEFECTS, Defect, in_one_file
from mm_engine.testing import CheckReport, check_plugin

PAGE = Path(__file__).with_name("defects.md")
HEAD = """# Defects on record

<!-- Written by docs/record_defects.py: run `make defects`. -->

What `engine plugins check` says of mistakes that plugins have. Each was put into mm-llava-next,
alone, and the whole check was run on a checkpoint of random weights. Shown is the first check that
failed; the plugin as it is passes all {num_checks}. `tests/testing/test_defects.py` puts the same
defects in (`tests/defects.py` has the edits) and fails where one isn't found, or another hook is
named than here.

| defect | check | hook named | expected | got |
|---|---|---|---|---|
"""


def checked(source: str, folder: Path, checkpoint: Path) -> CheckReport:
    """The report on `source` as a one-file plugin."""
    file = folder / "plugin.py"
    file.write_text(source)
    return check_plugin(str(file), str(checkpoint))


def row(name: str, defect: Defect, report: CheckReport) -> str:
    """One row of the table.

    Raises:
        ValueError: the defect wasn't found, or another hook was named.
    """
    first = next(iter(report.failures), None)
    if first is None or first.hook != defect.hook:
        raise ValueError(f"{name}: {first} instead of a failure of {defect.hook}")
    cells = (name, f"`{first.name}`", f"`{first.hook}`", first.expected, first.got)
    return "| " + " | ".join((cell or "").replace("|", "\\|") for cell in cells) + " |\n"


def main() -> None:
    """Check the plugin as it is, then with each defect, and write the page."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = make_llava_next(folder / "checkpoint")
        whole = checked(in_one_file(), folder, checkpoint)
        if not whole.passed:
            raise ValueError(f"the plugin without a defect fails: {whole.failures}")
        rows = [
            row(name, defect, checked(defect.source(), folder, checkpoint))
            for name, defect in track(DEFECTS.items(), "Defects")
        ]
    PAGE.write_text(HEAD.format(num_checks=len(whole.results)) + "".join(rows), "utf-8")


if __name__ == "__main__":
    main()
