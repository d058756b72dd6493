"""What is wrong with the installed plugins, each with its cure: `engine plugins doctor`."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata

from packaging.requirements import InvalidRequirement, Requirement
from packaging.version import InvalidVersion, Version

from mm_engine.errors import StartupError
from mm_engine.plugins.blame import one_line
from mm_engine.plugins.discovery import (
    CONFIG_GROUP,
    DEMO_GROUP,
    PLUGIN_GROUP,
    installed,
    package_folder,
)
from mm_engine.plugins.installation import (
    ENGINE,
    GROUPS,
    Installation,
    installations,
    recorded,
    spec_of,
)
from mm_engine.plugins.probe import ProbeResult, probe
from mm_engine.plugins.record import PluginRecord
from mm_engine.plugins.versions import normalized, unmet_range

MAX_SECONDS = 86400.0  # for one plugin's import


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    kind: str  # stable, kebab-case
    distribution: str
    version: str
    problem: str  # one line
    cure: str  # a command for the shell

    @property
    def label(self) -> str:
        """Distribution and version."""
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What was looked at, and what is wrong with it."""

    plugins: tuple[str, ...]  # labels
    findings: tuple[Finding, ...]


def diagnose(seconds: float) -> Diagnosis:
    """Look at all that is installed; the import of a plugin may take `seconds`."""
    everything = installations()
    first = {normalized(each.name): each for each in reversed(everything)}
    findings: list[Finding] = [*_duplicates(everything), *_two_owners(installed())]
    to_import: list[tuple[Installation, PluginRecord]] = []
    for each in first.values():
        try:
            _examine(each, findings, to_import)
        except Exception as error:  # whatever is wrong with one, the others are examined, too
            problem = f"it can't be examined: {each.folder} ({one_line(error)})"
            findings.append(_finding("damaged-metadata", each, problem, each.reinstall()))
    try:
        results = probe([record for _, record in to_import], seconds)
        for (each, record), result in zip(to_import, results, strict=True):
            findings += _imported(each, record, result, findings, seconds)
    except StartupError as error:  # nothing can be imported, and no plugin is served
        findings.append(_engine_broken(error))
    plugins = tuple(sorted(each.label for each in first.values() if each.entry_points))
    findings.sort(key=lambda finding: normalized(finding.distribution))
    return Diagnosis(plugins, tuple(dict.fromkeys(findings)))


def _examine(
    each: Installation, findings: list[Finding], to_import: list[tuple[Installation, PluginRecord]]
) -> None:
    """Add what is wrong with one, and its modules with hooks where they can be imported."""
    before = len(findings)
    findings += _metadata(each)
    findings += _editable(each) if each.source is not None else _files(each)
    gone = any(finding.kind in ("source-gone", "files-gone") for finding in findings[before:])
    findings += _requirements(each)
    if gone or any(damage.startswith("METADATA") for damage in each.damage):
        return  # what it points to is gone, too, or can't be loaded
    findings += _entry_points(each)
    if unmet_range(each.name) is not None:
        return  # it isn't loaded, and the requirement is told of above
    modules = {p.value: p for p in each.entry_points if p.group == PLUGIN_GROUP}
    for point in modules.values():
        if spec_of(point.value) is not None:
            record = PluginRecord(each.name, each.version, point.value, point.name)
            to_import.append((each, record))


def _finding(kind: str, each: Installation, problem: str, cure: str) -> Finding:
    return Finding(kind, each.name, each.version, " ".join(problem.split()), cure)


def _duplicates(everything: Sequence[Installation]) -> Iterator[Finding]:
    first: dict[str, Installation] = {}
    for each in everything:
        used = first.setdefault(normalized(each.name), each)
        if used is not each:
            yield _finding(
                "duplicate-metadata",
                used,
                f"its metadata lies on the import path twice: {each.folder.name} of "
                f"{each.folder.parent} is passed over",
                f"rm -r {shlex.quote(str(each.folder))} && {used.reinstall()}",
            )


def _two_owners(records: Sequence[PluginRecord]) -> Iterator[Finding]:
    owners: dict[str, list[PluginRecord]] = {}
    for record in records:
        owners.setdefault(record.architecture, []).append(record)
    for architecture, claims in owners.items():
        first, *others = sorted(claims, key=lambda record: record.label)
        for other in others:
            names = sorted(shlex.quote(record.distribution) for record in (first, other))
            yield Finding(
                "two-owners",
                other.distribution,
                other.version,
                f"it claims {architecture}, and so does {first.label}; "
                "keep one, or choose at each start",
                f"engine serve MODEL --plugin {architecture}={names[0]}  # or ={names[1]}",
            )


def _metadata(each: Installation) -> Iterator[Finding]:
    for damage in each.damage:
        yield _finding("damaged-metadata", each, f"{damage} in {each.folder}", each.reinstall())


def _editable(each: Installation) -> Iterator[Finding]:
    """A checkout that has moved away from what was written down when it was installed."""
    source, project = each.source, each.project()
    if source is None or not (source / "pyproject.toml").is_file():
        problem = f"its source is gone: {source}"
        yield _finding("source-gone", each, problem, f"pip uninstall -y {shlex.quote(each.name)}")
        return
    version = project.get("version")
    if isinstance(version, str) and not _same_version(version, each.version):
        problem = f"pyproject.toml has version {version} by now: {source}"
        yield _finding("version-changed", each, problem, each.reinstall())
    declared = project.get("entry-points")
    declared = declared if isinstance(declared, dict) else {}
    new = {
        (group, name, value)
        for group in GROUPS
        for name, value in (declared.get(group) or {}).items()
    }
    old = {(point.group, point.name, point.value) for point in each.entry_points}
    if project and new != old:
        _, name, value = min(new ^ old)
        problem = f"pyproject.toml has other entry points by now, {name} = {value!r} among them"
        yield _finding("entry-points-changed", each, problem, each.reinstall())


def _same_version(one: str, other: str) -> bool:
    try:
        return Version(one) == Version(other)
    except InvalidVersion:
        return one == other


def _files(each: Installation) -> Iterator[Finding]:
    """Files that RECORD lists; bytecode comes and goes."""
    try:
        files = recorded(each.folder)
    except (OSError, ValueError, csv.Error):  # damage is told of elsewhere
        return
    site = each.folder.parent
    gone = [file for file in files if not file.endswith(".pyc") and not (site / file).exists()]
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        problem = f"files that were installed are gone: {gone[0]}{more}"
        yield _finding("files-gone", each, problem, each.reinstall())


def _engine_broken(error: StartupError) -> Finding:
    problem, _, cure = str(error).rpartition(" Run: ")
    version = metadata.version("mm-engine")
    return Finding("engine-broken", "mm-engine", version, problem.rstrip("."), cure)


def _requirements(each: Installation) -> Iterator[Finding]:
    for text in each.requires:
        try:
            wanted = Requirement(text)
        except InvalidRequirement:
            problem = f"METADATA has a requirement that is none: {text!r} in {each.folder}"
            yield _finding("damaged-metadata", each, problem, each.reinstall())
            continue
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        needed = f"{wanted.name}{wanted.specifier}"
        try:
            version = metadata.version(wanted.name)
        except (metadata.PackageNotFoundError, KeyError):
            cure = f"pip install {shlex.quote(needed)}"
            yield _finding("requirement", each, f"it needs {needed}, which isn't installed", cure)
            continue
        if version and not wanted.specifier.contains(version, prereleases=True):
            cure = f"pip install {shlex.quote(needed)}"
            if normalized(wanted.name) in ENGINE and _is_for_older(wanted, version):
                cure = _upgrade(each)  # to one that fits this mm-engine
            problem = f"it needs {needed}, and {version} is installed"
            yield _finding("requirement", each, problem, cure)


def _is_for_older(wanted: Requirement, version: str) -> bool:
    return all(
        Version(part.version.removesuffix(".*")) <= Version(version)
        for part in wanted.specifier
        if part.operator != "!="
    )


def _entry_points(each: Installation) -> Iterator[Finding]:
    """Entry points whose module or folder isn't there."""
    for point in each.entry_points:
        if any(point.name in damage for damage in each.damage):
            continue
        what = f"{point.group}: {point.name} = {point.value}"
        if point.group == PLUGIN_GROUP and spec_of(point.value) is None:
            problem = f"an entry point points nowhere ({what}): there is no such module"
            yield _finding("module-missing", each, problem, _repoint(each))
        elif point.group in (DEMO_GROUP, CONFIG_GROUP):
            folder = package_folder(point.value)
            if folder is None or not (folder / "config.json").is_file():
                thing = "such folder" if folder is None else f"config.json in {folder}"
                problem = f"an entry point points nowhere ({what}): there is no {thing}"
                yield _finding("folder-missing", each, problem, _repoint(each))


def _repoint(each: Installation) -> str:
    if each.source is None:
        return each.reinstall()
    return f"{_edit(str(each.source / 'pyproject.toml'))} && {each.reinstall()}"


def _edit(file: str, line: int | None = None) -> str:
    return f"${{EDITOR:-vi}} {f'+{line} ' if line else ''}{shlex.quote(file)}"


def _imported(
    each: Installation,
    record: PluginRecord,
    result: ProbeResult,
    known: Iterable[Finding],
    seconds: float,
) -> Iterator[Finding]:
    if result.state == "ok":
        return
    # Whoever works on it mends it; to others a newer release is the cure.
    declare = ""
    edit = _edit(result.file, result.line) if each.source is not None and result.file else None
    cure = edit or _upgrade(each)
    missing = (result.missing_module or "").partition(".")[0]
    if result.missing_module and missing == record.module.partition(".")[0]:
        cure = edit or each.reinstall()
    elif missing:
        if any(found.kind == "requirement" and found.label == each.label for found in known):
            return  # a requirement that isn't met, and this is what comes of it
        # Which distribution brings the module isn't known: its name says nothing of that.
        declare = "; its dependencies must name what brings that module"
        if each.source is not None:
            cure = f"{_edit(str(each.source / 'pyproject.toml'))} && {each.reinstall()}"
    kinds = {"hooks": "hooks", "import": "import-error", "hung": "hangs", "died": "dies"}
    problem = re.sub(r"\s*Repair it, or run: .*$", "", result.message)
    problem = problem.removeprefix(f"the plugin {record.label} ").removeprefix(f"{record.label} · ")
    problem = f"{problem.rstrip('.')}{declare}"
    if result.state == "hung":
        cure = f"engine plugins doctor --timeout {min(4 * seconds, MAX_SECONDS):g}"
    yield _finding(kinds[result.state], each, problem, cure)


def _upgrade(each: Installation) -> str:
    return f"pip install --upgrade {shlex.quote(each.name)}"
