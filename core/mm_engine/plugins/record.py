"""The record by which every process loads the same plugin."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PluginRecord:
    """Everything that a process needs to load the same plugin as another one did."""

    distribution: str  # as in `pip install <distribution>`; a one-file plugin: the file's name
    version: str  # a one-file plugin: the start of its content's SHA-256
    module: str
    architecture: str
    path: str | None = None  # of a one-file plugin

    @property
    def label(self) -> str:
        """Distribution and version, as messages name them: `mm-foo 0.1.0`."""
        return f"{self.distribution} {self.version}"
