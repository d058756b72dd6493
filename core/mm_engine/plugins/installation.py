"""What lies on the import path: distributions as they are on disk, damaged ones too."""

from __future__ import annotations

import csv
import importlib.machinery
import importlib.util
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from packaging.version import InvalidVersion, Version

from mm_engine.plugins.discovery import CONFIG_GROUP, DEMO_GROUP, PLUGIN_GROUP
from mm_engine.plugins.tolerance import ExactDistribution
from mm_engine.plugins.versions import normalized

GROUPS = (PLUGIN_GROUP, DEMO_GROUP, CONFIG_GROUP)
HEADER = re.compile(rb"^\s*\[mm_engine\.\w+\]\s*$", re.MULTILINE)
#: Damage of any distribution that other programs fail of: Python reads all entry points at once.
BREAKS_ALL = "entry_points.txt can't be parsed"
ENGINE = ("mm-engine", "mm-engine-kernels")


@dataclass(frozen=True, slots=True)
class Installation:
    """One folder of metadata (`*.dist-info`, `*.egg-info`) on the import path."""

    folder: Path
    name: str  # from the metadata, or else from the folder's name
    version: str
    requires: tuple[str, ...]
    entry_points: tuple[metadata.EntryPoint, ...]  # those of mm-engine's groups
    damage: tuple[str, ...]  # what can't be read, as `METADATA (has no Name)`

    @property
    def label(self) -> str:
        """Name and version, as messages have them."""
        return f"{self.name} {self.version}"

    @property
    def source(self) -> Path | None:
        """The folder that was installed in editable mode; None for a usual installation."""
        origin = self._origin()
        editable = origin.get("dir_info", {}).get("editable") is True
        return _local_path(origin) if editable else None

    def project(self) -> dict[str, Any]:
        """The `project` table of an editable installation's pyproject.toml; empty without one."""
        if self.source is None:
            return {}
        try:
            table = tomllib.loads((self.source / "pyproject.toml").read_text("utf-8"))
        except (OSError, ValueError):
            return {}
        project = table.get("project")
        return project if isinstance(project, dict) else {}

    def reinstall(self) -> str:
        """The command that writes this installation anew."""
        if self.source is not None:
            return f"pip install -e {shlex.quote(str(self.source))}"
        path = _local_path(self._origin())
        if path is not None and path.exists():
            return f"pip install --force-reinstall --no-deps {shlex.quote(str(path))}"
        return f"pip install --force-reinstall --no-deps {shlex.quote(self.name)}"

    def _origin(self) -> dict[str, Any]:
        try:
            origin = json.loads((self.folder / "direct_url.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return origin if isinstance(origin, dict) else {}


def _local_path(origin: dict[str, Any]) -> Path | None:
    url = urlsplit(str(origin.get("url", "")))
    return Path(unquote(url.path)) if url.scheme == "file" else None


def installations() -> list[Installation]:
    """Return all that has to do with mm-engine, in the order of the import path."""
    found = {}
    for distribution in metadata.distributions():
        info = getattr(distribution, "_path", None)  # a zip file's has no folder to look into
        if isinstance(info, Path) and info.is_dir() and info.resolve() not in found:
            found[info.resolve()] = read(info)
    concerned = {normalized(each.name) for each in found.values() if _is_ours(each)}
    return [each for each in found.values() if normalized(each.name) in concerned]


def _is_ours(installation: Installation) -> bool:
    if installation.entry_points or normalized(installation.name) in ENGINE:
        return True
    if any(damage.startswith(BREAKS_ALL) for damage in installation.damage):
        return True
    if not any(installation.folder.iterdir()):  # by its name, as nothing else is left of it
        return normalized(installation.name).startswith("mm-")
    return bool(installation.damage) and (
        b"mm_engine." in _bytes(installation.folder / "entry_points.txt")
        or b"Requires-Dist: mm-engine" in _bytes(installation.folder / "METADATA")
    )


def read(info: Path) -> Installation:
    """Return what a folder of metadata says, and what of it can't be read."""
    distribution = ExactDistribution(info)
    stem = info.name.removesuffix(".dist-info").removesuffix(".egg-info")
    guessed, _, rest = stem.lstrip("~").partition("-")
    name, version, damage = guessed.replace("_", "-"), rest or "unknown", []
    requires: tuple[str, ...] = ()
    try:
        (info / ("PKG-INFO" if info.suffix == ".egg-info" else "METADATA")).read_text("utf-8")
        given = distribution.metadata
        if not given["Name"] or not given["Version"]:
            damage.append(f"METADATA has no {'Name' if not given['Name'] else 'Version'}")
        elif normalized(given["Name"]) != normalized(guessed):
            damage.append(f"METADATA names another distribution than its folder: {given['Name']}")
        name, version = given["Name"] or name, given["Version"] or version
        requires = tuple(distribution.requires or ())
        Version(version if given["Version"] else "0")
    except InvalidVersion:
        damage.append(f"METADATA has a version that is none: {version!r}")
    except (OSError, ValueError, KeyError) as error:
        damage.append(f"METADATA can't be read ({type(error).__name__})")
    points: tuple[metadata.EntryPoint, ...] = ()
    try:
        points = tuple(point for point in distribution.entry_points if point.group in GROUPS)
        for point in points:
            if not re.fullmatch(r"\w+(\.\w+)*", point.value):
                damage.append(f"entry_points.txt names no module for {point.name}: {point.value!r}")
        text = _bytes(info / "entry_points.txt")
        text.decode()
        if b"[mm_engine." in text and not HEADER.search(text):
            damage.append("entry_points.txt can't be read (no section)")
    except Exception as error:  # importlib.metadata's parser raises what comes along
        damage.append(f"{BREAKS_ALL} ({type(error).__name__})")
    damage += _changed(info)
    return Installation(info, name, version, requires, points, tuple(damage))


def recorded(info: Path) -> dict[str, int | None]:
    """Return the files that RECORD lists, as it spells their paths, with their sizes.

    Raises:
        ValueError: it can't be read, or is another's.
    """
    file = info / "RECORD"
    if not file.exists():
        return {}
    rows = [row for row in csv.reader(file.read_text("utf-8").splitlines()) if row]
    try:
        files = {path: int(size) if size else None for path, _, size in rows}
    except ValueError:
        raise ValueError("a row has other columns than path, hash and size") from None
    if f"{info.name}/METADATA" not in files:
        raise ValueError("it doesn't list METADATA")
    return files


def _changed(info: Path) -> Iterator[str]:
    """The files that decide what is found, where they aren't what was installed."""
    try:
        files = recorded(info)
    except (OSError, ValueError, csv.Error) as error:
        reason = str(error) if type(error) is ValueError else type(error).__name__
        yield f"RECORD can't be read ({reason})"
        return
    for name in ("METADATA", "entry_points.txt"):
        size, installed = len(_bytes(info / name)), files.get(f"{info.name}/{name}")
        if installed is not None and size != installed:
            yield f"{name} has {size} bytes, and {installed} were installed"


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def spec_of(module: str) -> importlib.machinery.ModuleSpec | None:
    """Return where a module lies, or None; no part of it is imported."""
    first, *rest = module.split(".")
    try:
        spec = importlib.util.find_spec(first)
        for index in range(len(rest)):
            if spec is None or spec.submodule_search_locations is None:
                return None
            name = ".".join([first, *rest[: index + 1]])
            places = list(spec.submodule_search_locations)
            spec = importlib.machinery.PathFinder.find_spec(name, places)
    except (ImportError, ValueError):
        return None
    return spec
