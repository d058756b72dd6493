"""Distributions as pip leaves them, sound or broken, in a folder that is put on the import path."""

from __future__ import annotations

import json
import os
import subprocess
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import forking
from serving import ENGINE

HOOKS = """
from mm_engine.plugins import hookimpl
from torch import nn
@hookimpl
def model_class(ctx): return nn.Identity
@hookimpl
def max_tokens(ctx, modality): return 4
"""


def write_distribution(
    folder: Path,
    name: str,
    version: str = "0.1.0",
    *,
    plugins: Mapping[str, str] | None = None,
    demos: Mapping[str, str] | None = None,
    configs: Mapping[str, str] | None = None,
    files: Mapping[str, str] | None = None,
    requires: Sequence[str] = (),
    source: Path | None = None,
    record: bool = False,
) -> Path:
    """Write a dist-info folder and `files` into `folder`; returns the dist-info.

    With `source` it is an editable installation of that folder; with `record` it has a RECORD.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {text}" for text in requires]
    (info / "METADATA").write_text("\n".join(lines) + "\n")
    groups = {"plugins": plugins, "demos": demos, "test_configs": configs}
    points = ""
    for group, given in groups.items():
        points += f"[mm_engine.{group}]\n"
        points += "".join(f"{key} = {value}\n" for key, value in (given or {}).items())
    (info / "entry_points.txt").write_text(points)
    if source is not None:
        origin = {"url": source.as_uri(), "dir_info": {"editable": True}}
        (info / "direct_url.json").write_text(json.dumps(origin))
    for path, text in (files or {}).items():
        file = (source or folder) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    if record:
        listed = [folder / path for path in files or {}] + [info / "METADATA"]
        listed.append(info / "entry_points.txt")
        rows = [f"{file.relative_to(folder)},,{file.stat().st_size}" for file in listed]
        (info / "RECORD").write_text("\n".join(rows) + "\n")
    return info


def engine(
    *arguments: str, path: Sequence[Path] = (), fresh: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `engine` with `path` on its import path; `fresh`ly started, or forked to save time."""
    popen = subprocess.Popen if fresh else forking.Popen
    return forking.run(
        [ENGINE, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *_own_path()])},
        timeout=300,
        popen=popen,
    )


def _own_path() -> list[str]:
    return [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
