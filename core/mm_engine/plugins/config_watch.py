"""A model's config is shared by all requests: a hook that writes to it is found out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig


class ConfigWatch:
    """What a config and the configs in it said when the watch began."""

    def __init__(self, config: PreTrainedConfig) -> None:
        self._before = [(part, copy.deepcopy(_public(part))) for part in _parts(config)]

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
