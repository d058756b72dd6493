"""Which plugin is meant, and which checkpoint it is to be checked with."""

from __future__ import annotations

import ast
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from mm_engine.errors import StartupError
from mm_engine.plugins.discovery import CONFIG_GROUP, DEMO_GROUP, demos, installed, package_folder
from mm_engine.plugins.one_file import declared_architectures, record_of
from mm_engine.plugins.record import PluginRecord
from mm_engine.plugins.versions import normalized


@dataclass(frozen=True, slots=True)
class Target:
    """A plugin and the folder to check it with: a whole checkpoint, or a config to make one of."""

    record: PluginRecord
    folder: Path | None  # None: the plugin brings neither
    is_config: bool = False  # a checkpoint with random weights is to be made of `folder`
    origin: str = ""  # where the folder comes from, for the report


def find_target(plugin: str, model: str | None) -> Target:
    """Return what `plugin` (a distribution, an architecture, a file) and `model` mean.

    Raises:
        StartupError: no such plugin or checkpoint, several are meant, or the two don't fit.
    """
    folder = _locate(model) if model is not None else None
    wanted = _architecture(folder) if folder is not None else None
    if plugin.endswith(".py"):
        return _of_file(Path(plugin), folder, wanted)
    records = [
        record
        for record in installed()
        if record.architecture == plugin or normalized(record.distribution) == normalized(plugin)
    ]
    if not records:
        listed = ", ".join(f"{r.distribution} ({r.architecture})" for r in installed()) or "none"
        raise StartupError(
            f"no such plugin is installed: {plugin}. Give a distribution, an architecture or the "
            f"path of a .py file. Installed: {listed}."
        )
    if wanted is not None:
        fitting = [record for record in records if record.architecture == wanted]
        if not fitting:
            served = ", ".join(sorted(record.architecture for record in records))
            raise StartupError(
                f"the checkpoint is of another architecture than {plugin} serves: {wanted}, not "
                f"{served}. Give --model a checkpoint of that."
            )
        records = fitting
    if len(records) > 1:
        choices = sorted({r.architecture for r in records})
        if len(choices) == 1:
            choices = sorted(record.distribution for record in records)
        raise StartupError(f"{plugin} means several plugins: {', '.join(choices)}. Name one.")
    record = records[0]
    if folder is not None:
        return Target(record, folder, origin="given")
    return _bundled(record) or _test_config(record) or Target(record, None)


def _locate(model: str) -> Path:
    bundled = demos()
    if model in bundled:
        return bundled[model]
    from mm_engine.models import checkpoint  # here: it takes seconds to import

    return checkpoint.locate(model)


def _architecture(folder: Path) -> str:
    from mm_engine.models import checkpoint

    return checkpoint.read_architecture(folder)


def _of_file(path: Path, folder: Path | None, wanted: str | None) -> Target:
    try:
        declared = declared_architectures(path)
    except StartupError:
        if not path.is_file():
            raise
        declared = None  # no Python: the check of its hooks says so
    config = None
    if folder is None:
        config = _named_folder(path)
        wanted = _architecture(config) if config is not None else None
    if wanted is not None and declared is not None and wanted not in declared:
        raise StartupError(
            f"the checkpoint is of another architecture than {path.name} serves: {wanted}, not "
            f"{', '.join(declared)}. Give --model a checkpoint of that."
        )
    record = record_of(path, wanted or (declared or ["unknown"])[0])
    if folder is not None:
        return Target(record, folder, origin="given")
    if config is None:
        return Target(record, None)
    is_config = not _has_weights(config)
    return Target(record, config, is_config, f"TEST_CONFIG of {path.name}")


def _named_folder(path: Path) -> Path | None:
    """The folder that `TEST_CONFIG = "./tiny"` in a plugin file names; its code isn't run."""
    try:
        body = ast.parse(path.read_bytes(), filename=path.name).body
    except (SyntaxError, ValueError):
        return None
    for node in body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        if not any(isinstance(name, ast.Name) and name.id == "TEST_CONFIG" for name in targets):
            continue
        value = getattr(node, "value", None)
        if not (isinstance(value, ast.Constant) and isinstance(value.value, str)):
            raise StartupError(
                f"TEST_CONFIG in the plugin file isn't a written-out path: {path}. "
                'Write TEST_CONFIG = "./tiny".'
            )
        folder = path.parent / value.value
        if not (folder / "config.json").is_file():
            raise StartupError(
                f"TEST_CONFIG names a folder without config.json: {folder}. Put the config there."
            )
        return folder.resolve()
    return None


def _bundled(record: PluginRecord) -> Target | None:
    for name, folder in _folders(record.distribution, DEMO_GROUP):
        if _architectures(folder) == [record.architecture] and _has_weights(folder):
            return Target(record, folder, origin=f"bundled: {name}")
    return None


def _test_config(record: PluginRecord) -> Target | None:
    for name, folder in _folders(record.distribution, CONFIG_GROUP):
        if name == record.architecture:
            origin = f"{CONFIG_GROUP} of {record.distribution}"
            return Target(record, folder, not _has_weights(folder), origin)
    return None


def _folders(distribution: str, group: str) -> Sequence[tuple[str, Path]]:
    """Name and folder of each entry point of a distribution in `group`; imports nothing."""
    try:
        points = metadata.distribution(distribution).entry_points.select(group=group)
    except metadata.PackageNotFoundError:  # its folder has another name: whoever loads it says so
        return []
    folders = [(point.name, package_folder(point.value)) for point in points]
    return [
        (name, folder.resolve())
        for name, folder in folders
        if folder is not None and (folder / "config.json").is_file()
    ]


def _architectures(folder: Path) -> object:
    try:
        return json.loads((folder / "config.json").read_text("utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError):
        return None


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors"))
