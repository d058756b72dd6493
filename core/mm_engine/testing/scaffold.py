"""A new plugin's package, from the templates beside this file: `engine plugins new`."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from string import Template

from mm_engine.errors import StartupError

TEMPLATES = Path(__file__).with_name("templates")
SUFFIX = ".tmpl"
#: Names in `templates/` that a tool would act on or leave out there, and what they become.
RENAMED = {"dot-": ".", "dunder-init": "__init__"}
NAME = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?")  # PEP 508
MAX_NAME_LENGTH = 40  # longer ones make lines of more than 100 characters
MAX_ARCHITECTURE_LENGTH = 60


@dataclass(frozen=True, slots=True)
class PluginNames:
    """What a new plugin is called."""

    distribution: str  # as in `pip install <distribution>`
    package: str  # as in `import <package>`
    architecture: str  # as in a checkpoint's config.json


def names_of(distribution: str, architecture: str | None = None) -> PluginNames:
    """Return the names of a new plugin; without `architecture` it is made from the first.

    Raises:
        StartupError: one of them can't be used, and why.
    """
    remedy = "Take letters, digits and hyphens, such as mm-foo."
    if not NAME.fullmatch(distribution):
        bad = [
            character for character in distribution if not re.match(r"[A-Za-z0-9._-]", character)
        ]
        fault = (
            f"it holds {bad[0]!r}"
            if bad
            else "it is empty"
            if not distribution
            else "it must start and end with a letter or a digit"
        )
        raise StartupError(f"a package can't have this name: {distribution!r} ({fault}). {remedy}")
    if len(distribution) > MAX_NAME_LENGTH:
        raise StartupError(
            f"the name is too long: {len(distribution)} characters. Take at most {MAX_NAME_LENGTH}."
        )
    package = re.sub(r"[-_.]+", "_", distribution).lower()
    if not package.isidentifier() or keyword.iskeyword(package):
        raise StartupError(
            f"Python can't import a package of this name: {package}. "
            "Take one that starts with a letter and is no keyword, such as mm-foo."
        )
    found = _module_of(package)
    if found is not None:
        raise StartupError(
            f"a module of this name is there already: {package} ({found}), and the new one "
            "would hide it. Take another name."
        )
    architecture = architecture or _architecture_of(package)
    if not architecture.isidentifier() or keyword.iskeyword(architecture):
        raise StartupError(
            f"the architecture can't be the name of a class: {architecture!r}. "
            "Give the one in the checkpoint's config.json, such as FooForConditionalGeneration."
        )
    if len(architecture) > MAX_ARCHITECTURE_LENGTH:
        raise StartupError(
            f"the architecture's name is too long: {len(architecture)} characters. "
            f"Take at most {MAX_ARCHITECTURE_LENGTH}: --architecture."
        )
    return PluginNames(distribution, package, architecture)


def _module_of(package: str) -> str | None:
    """Where a module of this name comes from, or None if there is none."""
    if package in sys.stdlib_module_names:
        return "Python's own"
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    if spec is None:
        return None
    return spec.origin or ", ".join(spec.submodule_search_locations or ()) or "built in"


def _architecture_of(package: str) -> str:
    words = package.removeprefix("mm_").split("_")
    name = "".join(word[:1].upper() + word[1:] for word in words if word)
    return f"{name}ForConditionalGeneration"


def requirement(version: str) -> str:
    """Return what a plugin made for this version of mm-engine requires: `mm-engine>=0.1,<0.2`.

    The contract follows semantic versions: before 1.0 a minor version may break it, then a major.
    """
    major, minor = (int(number) for number in re.findall(r"\d+", version)[:2])
    below = f"0.{minor + 1}" if major == 0 else str(major + 1)
    return f"mm-engine>={major}.{minor},<{below}"


def write_plugin(
    names: PluginNames, folder: Path, *, on_step: Callable[[str], None] = lambda step: None
) -> list[Path]:
    """Write the package to `folder`; returns its files, relative to it.

    It appears there whole or not at all. `on_step` is told what is being done.

    Raises:
        StartupError: there is something in `folder` already, or it can't be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StartupError(
            f"there is something already: {folder}. Take another name or another --path, "
            "or move it away."
        )
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
            made = Path(temporary, folder.name)
            on_step("Writing the package")
            _write_templates(names, made)
            on_step("Drawing the weights of its tiny checkpoint (seed 0)")
            _complete_checkpoint(made / names.package / "tiny")
            files = sorted(file.relative_to(made) for file in made.rglob("*") if file.is_file())
            os.replace(made, folder)
    except OSError as error:
        raise StartupError(
            f"the package can't be written: {error.filename or folder} ({error.strerror}). "
            "Name a folder that you may write to: --path."
        ) from error
    return files


def _write_templates(names: PluginNames, folder: Path) -> None:
    values = {
        "distribution": names.distribution,
        "package": names.package,
        "architecture": names.architecture,
        "requirement": requirement(metadata.version("mm-engine")),
    }
    for template in sorted(TEMPLATES.rglob(f"*{SUFFIX}")):
        parts = template.relative_to(TEMPLATES).with_suffix("").parts
        file = folder.joinpath(*(_written_as(part, names.package) for part in parts))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(Template(template.read_text("utf-8")).substitute(values), "utf-8")


def _complete_checkpoint(folder: Path) -> None:
    """Add a tokenizer and random weights to the config in `folder`."""
    from transformers import AutoConfig  # here: it takes seconds to import

    from mm_engine.testing.oracle import quiet
    from mm_engine.testing.random_checkpoint import byte_tokenizer, random_model

    config = AutoConfig.from_pretrained(folder)
    byte_tokenizer(config).save_pretrained(folder)
    with quiet(), tempfile.TemporaryDirectory() as temporary:  # it writes a config.json, too
        random_model(config).save_pretrained(temporary)
        shutil.copyfile(Path(temporary, "model.safetensors"), folder / "model.safetensors")


def _written_as(part: str, package: str) -> str:
    for name, written in RENAMED.items():
        if part.startswith(name):
            return written + part.removeprefix(name)
    return package if part == "package" else part
