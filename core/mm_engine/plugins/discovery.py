"""Which plugins are installed, and which one serves an architecture: read without importing any.

An entry point in the group `mm_engine.plugins` claims an architecture: its name is the one in the
checkpoint's config.json, its value the module with the hooks. Only the plugin that was asked for
is ever imported, so a broken one for another model can't hurt.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import shlex
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from mm_engine.errors import StartupError
from mm_engine.plugins.importing import import_guarded
from mm_engine.plugins.one_file import declared_architectures, import_file, record_of
from mm_engine.plugins.record import PluginRecord
from mm_engine.plugins.versions import ENGINE, normalized, unmet_range

if TYPE_CHECKING:
    from mm_engine.plugins.plugin import Plugin

__all__ = ["PluginRecord", "default_model", "demos", "find", "installed", "load"]

PLUGIN_GROUP = "mm_engine.plugins"
DEMO_GROUP = "mm_engine.demos"
CONFIG_GROUP = "mm_engine.test_configs"


def installed() -> list[PluginRecord]:
    """Return a record for each architecture that an installed distribution claims."""
    return [
        PluginRecord(distribution, version, entry_point.value, entry_point.name)
        for distribution, version, entry_point in _entry_points(PLUGIN_GROUP)
    ]


def find(architecture: str, choices: Sequence[str] = ()) -> PluginRecord:
    """Return the record of the plugin that serves `architecture`.

    `choices` are `--plugin` values: a path ending in .py is a one-file plugin, which wins over
    what is installed; `Architecture=distribution` picks one of several claimants.

    Raises:
        StartupError: nothing serves it, several do, or a choice can't be followed.
    """
    chosen, passed_over = None, ""
    for choice in choices:
        if choice.endswith(".py"):
            declared = declared_architectures(Path(choice))
            if declared is None or architecture in declared:
                return record_of(Path(choice), architecture)
            passed_over += f" {Path(choice).name} serves {', '.join(declared)} only."
        elif "=" in choice:
            name, _, distribution = choice.partition("=")
            chosen = distribution.strip() if name.strip() == architecture else chosen
        else:
            raise StartupError(
                f"--plugin takes neither: {choice}. "
                "Give ARCHITECTURE=DISTRIBUTION or the path of a .py file."
            )
    claimants = [record for record in installed() if record.architecture == architecture]
    if chosen is not None:
        return _chosen(architecture, chosen, claimants)
    if not claimants:
        raise StartupError(_not_found(architecture) + passed_over)
    if len(claimants) > 1:
        labels = " and ".join(record.label for record in claimants)
        raise StartupError(
            f"more than one installed plugin serves {architecture}: {labels}. "
            f"Choose one: --plugin {architecture}={claimants[0].distribution}"
        )
    return claimants[0]


def load(record: PluginRecord, *, timeout: float | None = None) -> Plugin:
    """Import the plugin of `record` and check its hooks; each process calls this with one record.

    `timeout` is the limit in seconds for one call of a hook, and for the import, which has a minute
    at least; None sets none.

    Raises:
        StartupError: it can't be imported, or isn't the one that the record names.
        PluginError: its hooks don't fit the hook specifications.
    """
    from mm_engine.plugins.plugin import Plugin  # here: it needs torch, finding a plugin doesn't

    module = (_import_installed if record.path is None else import_file)(record, timeout)
    return Plugin(record, module, timeout=timeout)


def demos() -> dict[str, Path]:
    """Return the checkpoints that installed packages bundle: name -> folder. Imports nothing."""
    found: dict[str, Path] = {}
    for _, _, entry_point in _entry_points(DEMO_GROUP):
        folder = package_folder(entry_point.value)
        if folder is not None:
            found.setdefault(entry_point.name, folder)
    return found


def package_folder(value: str) -> Path | None:
    """Return the folder that an entry point's value names, or None: `mm_foo/tiny` of `mm_foo.tiny`.

    Imports nothing.
    """
    package, *rest = value.split(".")
    try:
        spec = importlib.util.find_spec(package)  # a top-level name: found, not imported
    except (ImportError, ValueError):
        return None
    for location in (spec.submodule_search_locations if spec else None) or ():
        if Path(location, *rest).is_dir():
            return Path(location, *rest)
    return None


def default_model() -> str:
    """Return the name of the bundled checkpoint that is served when none is named.

    Raises:
        StartupError: no installed package bundles one.
    """
    bundled = sorted(demos())
    if not bundled:
        raise StartupError(
            "no model is named, and no installed plugin bundles a demo. "
            f"Name a checkpoint, or run: pip install {_known_packages()['demo']}"
        )
    return bundled[0]


def _known_packages() -> dict[str, Any]:
    """The small index for hints; nothing that is installed is looked up in it."""
    index: dict[str, Any] = json.loads(Path(__file__).with_name("known_packages.json").read_bytes())
    return index


def _entry_points(group: str) -> Iterator[tuple[str, str, metadata.EntryPoint]]:
    """Yield distribution, version and entry point, each distribution once.

    One that lies on sys.path twice (editable and as a wheel) counts as the first, which is also
    the one that `metadata.version` finds.
    """
    seen = set()
    for distribution in metadata.distributions():
        try:
            points = [point for point in distribution.entry_points if point.group == group]
            name, version = (distribution.name, distribution.version) if points else ("", "")
        except Exception:  # damaged metadata of some distribution on the path isn't our concern
            continue
        if name and normalized(name) not in seen:
            seen.add(normalized(name))
            for point in points:
                yield name, version or "unknown", point


def _chosen(architecture: str, chosen: str, claimants: Sequence[PluginRecord]) -> PluginRecord:
    for record in claimants:
        if normalized(record.distribution) == normalized(chosen):
            return record
    others = ", ".join(record.distribution for record in claimants) or "none"
    raise StartupError(
        f"--plugin names a distribution that doesn't serve {architecture}: {chosen}. "
        f"Install it, or choose one that does (installed: {others})."
    )


def _not_found(architecture: str) -> str:
    known = _known_packages()["architectures"]
    remedy = (
        f"Run: pip install {known[architecture]}"
        if architecture in known
        else "Install a plugin that does, or give one as a file: --plugin ./my_model.py"
    )
    listed = ", ".join(f"{record.label} ({record.architecture})" for record in installed())
    return (
        f"no installed plugin serves the checkpoint's architecture: {architecture}. {remedy}. "
        f"Installed plugins: {listed or 'none'}."
    )


def _import_installed(record: PluginRecord, timeout: float | None) -> ModuleType:
    try:
        version = metadata.version(record.distribution) or "unknown"
    except metadata.PackageNotFoundError:
        raise StartupError(
            f"the plugin isn't installed any more: {record.distribution}. "
            f"Run: pip install {shlex.quote(record.distribution)}"
        ) from None
    if version != record.version:
        raise StartupError(
            f"another version of {record.distribution} is installed than was asked for: {version}, "
            f"not {record.version}. Restart, so that every process loads the same one."
        )
    unmet = unmet_range(record.distribution)
    if unmet is not None:
        raise StartupError(
            f"the plugin {record.label} was made for another version of mm-engine: it requires "
            f"{unmet}, and {metadata.version(ENGINE)} is installed. "
            f"Run: pip install --upgrade {ENGINE} {shlex.quote(record.distribution)}"
        )
    return import_guarded(
        lambda: importlib.import_module(record.module),
        timeout,
        f"the plugin {record.label}",
        record.module,
        f"Repair it, or run: pip install --force-reinstall {shlex.quote(record.distribution)}",
    )
