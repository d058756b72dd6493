"""Plugins in one file, for development: `engine serve --plugin ./my_model.py`.

The file holds the hooks and may say which architectures it serves:
`ARCHITECTURES = ["NameInConfigJson"]`. Without that line it serves whichever is asked for.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from mm_engine.errors import StartupError
from mm_engine.plugins.blame import one_line
from mm_engine.plugins.importing import import_guarded
from mm_engine.plugins.record import PluginRecord


def declared_architectures(path: Path) -> list[str] | None:
    """Return what the file's `ARCHITECTURES` lists, or None if it has none.

    Read from the source: finding a plugin never runs its code.

    Raises:
        StartupError: the file can't be read, isn't Python, or the list isn't written out.
    """
    try:
        tree = ast.parse(_read(path), filename=path.name)
    except (SyntaxError, ValueError) as error:
        raise StartupError(f"the plugin file isn't Python: {path} ({one_line(error)}).") from error
    for node in tree.body:
        targets = node.targets if isinstance(node, ast.Assign) else []
        targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
        if any(isinstance(name, ast.Name) and name.id == "ARCHITECTURES" for name in targets):
            value = getattr(node, "value", None)
            names = value.elts if isinstance(value, ast.List | ast.Tuple) else [value]
            strings = [name.value for name in names if isinstance(name, ast.Constant)]
            if isinstance(value, ast.List | ast.Tuple) and len(strings) == len(names):
                return [str(string) for string in strings]
            raise StartupError(
                f"ARCHITECTURES in the plugin file isn't a written-out list of names: {path}. "
                'Write ARCHITECTURES = ["NameInConfigJson"].'
            )
    return None


def record_of(path: Path, architecture: str) -> PluginRecord:
    """Return the record by which the file is loaded; its version is the start of its SHA-256."""
    return PluginRecord(
        distribution=path.name,
        version=_version(_read(path)),
        module=f"mm_engine_file_{path.stem}",
        architecture=architecture,
        path=str(path.resolve()),
    )


def import_file(record: PluginRecord, timeout: float | None = None) -> ModuleType:
    """Import the file of `record` as the module that it names.

    Raises:
        StartupError: the file changed since the record was made, or raises when imported, or its
            import takes longer than `timeout` seconds (a minute at least).
    """
    path = Path(str(record.path))
    version = _version(_read(path))
    if version != record.version:
        raise StartupError(
            f"the plugin file changed since it was found: {path.name} is {version} and was "
            f"{record.version}. Restart, so that every process loads the same one."
        )
    spec = importlib.util.spec_from_file_location(record.module, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    loader = spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[record.module] = module

    def load() -> ModuleType:
        loader.exec_module(module)
        return module

    try:
        return import_guarded(load, timeout, "the plugin file", path.name, "Repair it.")
    except StartupError:
        sys.modules.pop(record.module, None)
        raise


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise StartupError(
            f"the plugin file can't be read: {path} ({error.strerror}). Check --plugin."
        ) from error


def _version(source: bytes) -> str:
    return f"sha256:{hashlib.sha256(source).hexdigest()[:12]}"
