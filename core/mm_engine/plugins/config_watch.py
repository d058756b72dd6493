"""A model's config is shared by all requests: a hook that writes to it is found out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from threading import Lock
from typing import Any

from transformers import PreTrainedConfig


class ConfigWatch:
    """What a config and the configs in it said before hooks were called; entered for each call.

    Between calls others may write: transformers does so when it builds a model.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self._config = config
        self._before: list[tuple[PreTrainedConfig, dict[str, Any]]] = []
        self._num_calls = 0  # under way
        self._lock = Lock()

    def __enter__(self) -> None:
        with self._lock:
            # While another call is under way, what it has written must not count as given.
            if not self._num_calls and any(_public(part) != old for part, old in self._before):
                self._before = []
            if not self._before:
                parts = _parts(self._config)
                self._before = [(part, copy.deepcopy(_public(part))) for part in parts]
            self._num_calls += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_calls -= 1

    def restore(self) -> str | None:
        """Undo what was changed since, and return the name of one changed attribute."""
        changed = None
        for part, before in self._before:
            now = _public(part)
            if now == before:
                continue
            for name in now.keys() | before.keys():
                if name not in before:
                    changed = name
                    delattr(part, name)
                elif name not in now or now[name] != before[name]:
                    changed = name
                    setattr(part, name, copy.deepcopy(before[name]))
        return changed


def _parts(config: PreTrainedConfig) -> Iterator[PreTrainedConfig]:
    yield config
    for value in list(vars(config).values()):
        if isinstance(value, PreTrainedConfig):
            yield from _parts(value)


def _public(config: PreTrainedConfig) -> dict[str, Any]:
    """The attributes that say something; what begins with `_` transformers writes as it likes."""
    return {
        name: value
        for name, value in vars(config).items()
        if not name.startswith("_") and not isinstance(value, PreTrainedConfig)
    }
