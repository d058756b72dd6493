"""A recipe's stages go on where a stopped run was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn


def test_a_finished_stage_is_taken_from_its_file(training: SimpleNamespace, tmp_path: Path) -> None:
    model, heads = nn.Linear(2, 2), nn.ModuleDict({"head": nn.Linear(2, 2)})
    runs: list[tuple[str, int]] = []

    def stage(name: str, fails: bool = False) -> object:
        def train(
            num_steps: int, rate: float, first_seed: int, on_report: Callable[[int], None]
        ) -> None:
            runs.append((name, first_seed))
            with torch.no_grad():
                model.weight += 1
            on_report(1)
            if fails:
                raise KeyboardInterrupt

        return training.recipe.Stage(name, train, 3, 0.1, len(name))

    before = model.weight.detach().clone()
    with pytest.raises(KeyboardInterrupt):
        training.recipe.run_stages([stage("one"), stage("second", True)], model, heads, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"one.pt", "second.partial"}
    assert torch.load(tmp_path / "second.partial")["step"] == 1

    training.recipe.run_stages([stage("one"), stage("second")], model, heads, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"one.pt", "second.pt"}
    assert runs == [("one", 3), ("second", 6), ("second", 6)]
    torch.testing.assert_close(model.weight.detach(), before + 2)  # not 3: "one" was taken up
