"""Write the README's tables of figures from the records in benchmarks/results/ (`make docs`).

Records of several engines (`is_of_peers`) and of comparisons (`is_comparison`) make one table each,
in the order of their files' names; what stands between the markers is this script's. A test fails
where the README is behind.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cpu_peer_parts.fleet import ENGINES
from cpu_peer_parts.report import about, figure, rows_of
from cpu_peer_parts.rows import OURS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- Written by benchmarks/table.py from benchmarks/results/: run `make docs`. -->"
END = "<!-- End of what benchmarks/table.py writes. -->"


def comparison(record: Mapping[str, Any]) -> str:
    """A comparison as a Markdown table, with a line about how it was measured."""
    lines = ["| | mm-engine | transformers | ratio |", "|---|---|---|---|"]
    for row in record["rows"]:
        ours, theirs = (figure(row[side], row["unit"]) for side in ("ours", "theirs"))
        lines.append(f"| {row['name']} | {ours} | {theirs} | **{row['ratio']:.2f}×** |")
    versions = record.get("versions", {})  # older records name them with the machine
    parts = [record["machine"]]
    parts += [f"{name} {versions[name]}" for name in ("torch", "transformers") if name in versions]
    parts += [record["dtype"]] if "dtype" in record else []
    commit = str(record["commit"] or "unknown")[:7]
    lines += ["", f"{', '.join(parts)}; medians of {record['rounds']} rounds, commit {commit}, "]
    lines[-1] += f"{record['date'][:10]}."
    return "\n".join(lines)


def peers(record: Mapping[str, Any]) -> str:
    """Several engines as a Markdown table, with a line about how they were measured.

    Of each other engine's figure it tells how many times better this engine is.
    """
    rows = [row for row in rows_of(record) if shown(row["key"]) and OURS in row["medians"]]
    measured = {name for row in rows for name in row["medians"]}
    others = [name for name in ENGINES if name != OURS and name in measured]
    lines = [f"| | {' | '.join([OURS, *others])} | floor |", "|---" * (len(others) + 3) + "|"]
    for row in rows:
        told = {n: figure(value, row["unit"]) for n, value in row["medians"].items()}
        cells = [f"**{told[OURS]}**"]
        cells += [f"{told[n]} ({row['ratios'][n]:.2f}×)" if n in told else "–" for n in others]
        cells.append("–" if row["floor"] is None else figure(row["floor"], row["unit"]))
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", about(record)])


def shown(key: str) -> bool:
    """Whether a row is one for the README; benchmarks/README.md and the record have the others."""
    return not key.startswith(("first", "context", "slope")) and not key.endswith("error")


def tables() -> str:
    """The tables of all comparisons on record."""
    records = [json.loads(path.read_text("utf-8")) for path in sorted(RESULTS.glob("*.json"))]
    found = [peers(record) for record in records if is_of_peers(record)]
    return "\n\n".join(found + [comparison(record) for record in records if is_comparison(record)])


def is_of_peers(record: Any) -> bool:
    """Whether a record is one of `cpu_peers.py`."""
    return isinstance(record, dict) and record.get("benchmark") == "cpu_peers"


def is_comparison(record: Any) -> bool:
    """Whether a record sets this engine beside another; other benchmarks lie in the folder too."""
    rows = record.get("rows") if isinstance(record, dict) else None
    sides = {"name", "unit", "ours", "theirs", "ratio"}
    return bool(rows) and all(isinstance(row, dict) and sides <= row.keys() for row in rows)


def updated(text: str) -> str:
    """A page with the tables between its markers."""
    between = re.compile(f"{re.escape(BEGIN)}.*{re.escape(END)}", re.DOTALL)
    new, count = between.subn(lambda _: f"{BEGIN}\n\n{tables()}\n\n{END}", text)
    assert count == 1, "README.md has lost the markers"
    return new


def main() -> None:
    """Write them."""
    README.write_text(updated(README.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
