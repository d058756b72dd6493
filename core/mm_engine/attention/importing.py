"""Optional packages: what is installed, and in one line why one can't be used."""

from __future__ import annotations

import importlib
from importlib import metadata

import torch


def import_fault(module: str, distribution: str, remedy: str) -> str | None:
    """Why `module` can't be imported, as words behind its name; None: it is imported now.

    A package that is compiled for another PyTorch fails in its own way: a symbol is missing, or a
    library. Whatever it raises is told in a line.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module.partition(".")[0]:
            return f"isn't installed: {remedy}"
        return _broken(distribution, error)
    except Exception as error:
        return _broken(distribution, error)
    return None


def version_of(distribution: str) -> str:
    """The installed version, or nothing where there is no metadata of it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def torch_version() -> str:
    """PyTorch's version as builds for it are named: 2.13."""
    return ".".join(torch.__version__.split(".")[:2])


def _broken(distribution: str, error: Exception) -> str:
    first = (str(error).strip() or type(error).__name__).splitlines()[0][:200].rstrip(". ")
    label = f"{version_of(distribution)} ".lstrip()
    return f"{label}can't be loaded: {first}. Install the one built for torch {torch_version()}"
