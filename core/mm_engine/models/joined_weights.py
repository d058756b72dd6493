"""Weights that checkpoints bring apart and transformers' modules hold joined, such as experts'."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)

from mm_engine.errors import StartupError


class JoinedWeights:
    """Holds back a backbone's parts as they are read, and joins them by transformers' own rules.

    Parts are memory-mapped, so that holding them takes no memory; joining takes that of one tensor.
    """

    def __init__(self, causal: Any, backbone_path: str) -> None:
        rules = get_model_conversion_mapping(causal, add_legacy=False)
        self.renamings = [
            rule
            for rule in rules
            if isinstance(rule, WeightRenaming) and not isinstance(rule, PrefixChange)
        ]
        self.converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        self.causal = causal
        self.prefix = f"{backbone_path}."
        #: By the name of what they become: each part's own name, the rule's pattern, the tensor.
        self.held: dict[str, list[tuple[str, str | None, Tensor]]] = {}

    def hold(self, name: str, tensor: Tensor) -> bool:
        """Keep a tensor of a checkpoint if a rule makes it (part of) one of another name.

        `name` counts from the backbone, as do those of `joined`.
        """
        own = self.prefix + name
        renamed, pattern = rename_source_key(own, self.renamings, self.converters)
        if renamed == own:
            return False
        self.held.setdefault(renamed, []).append((own, pattern, tensor))
        return True

    def joined(self) -> Iterator[tuple[str, Tensor]]:
        """Each `(name, tensor)` that the parts held so far make.

        Raises:
            StartupError: parts that belong together don't fit, or some of them are missing.
        """
        for renamed, parts in self.held.items():
            pattern = parts[0][1]
            if pattern is None:
                yield renamed.removeprefix(self.prefix), parts[0][2]
                continue
            rule: Any = copy.deepcopy(
                next(rule for rule in self.converters if pattern in rule.source_patterns)
            )
            # Experts are stacked in the order in which they come: by number, not by file.
            for own, part_pattern, tensor in sorted(
                parts, key=lambda part: dot_natural_key(part[0])
            ):
                rule.add_tensor(renamed, own, part_pattern, tensor)
            try:
                converted = rule.convert(renamed, model=self.causal, config=self.causal.config)
            except Exception as error:  # what transformers' operations raise
                raise StartupError(
                    f"weights that belong together don't fit: {parts[0][0]} and {len(parts) - 1} "
                    f"more ({type(error).__name__}: {error}). Fetch the checkpoint again."
                ) from error
            for name, tensor in converted.items():
                whole = tensor[0] if isinstance(tensor, list) else tensor
                yield name.removeprefix(self.prefix), whole
        self.held = {}
