"""The records that the scripts of this folder write: what they begin with, and their form."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_engine.cli.bench.machine import provenance


def begin(benchmark: str, path: Path | None) -> dict[str, Any]:
    """Name, machine, versions and commit of a measurement that begins now.

    If it is to be written to `path`, a line on stderr warns of a commit that isn't what runs.
    """
    record = {"benchmark": benchmark, **provenance()}
    if path is not None and str(record["commit"]).endswith("-dirty"):
        print(
            f"warning: files differ from the commit, and {path} will say so: "
            f"{record['commit']}. Commit first if the record is to be kept.",
            file=sys.stderr,
        )
    return record


def write(record: Mapping[str, Any], path: Path | None) -> None:
    """Write a record as JSON, if there is a path to write it to."""
    if path is not None:
        path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", "utf-8")
