"""Running a recipe: stages that are kept in files, and the checkpoint that they end in."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, ProcessorMixin

SEEDS_A_STAGE = 100_000_000
"""Each stage draws pictures from seeds of its own."""


class Stage(NamedTuple):
    """One stage; ``train`` changes the model in place."""

    name: str
    train: Callable[[int, float, int, Callable[[int], None]], None]
    """Takes the number of steps, the rate, the first seed and what to call at each report."""
    num_steps: int
    rate: float
    first_seed: int


def run_stages(
    stages: Iterable[Stage], model: PreTrainedModel, heads: nn.ModuleDict, work: Path
) -> None:
    """Run the stages in order, each starting from the one before.

    A stage ends in a file in ``work`` and is not run again where that is there. While it runs, it
    leaves its latest report's state in a file of its own, ending in ``.partial``.
    """
    work.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        path = work / f"{stage.name}.pt"
        if path.exists():
            state = torch.load(path)
            model.load_state_dict(state["model"])
            heads.load_state_dict(state["heads"])
            print(f"{stage.name}: taken from {path}", flush=True)
            continue
        started = time.monotonic()
        unfinished = path.with_suffix(".partial")
        keep_unfinished = partial(_keep, model, heads, unfinished)
        stage.train(stage.num_steps, stage.rate, stage.first_seed, keep_unfinished)
        _keep(model, heads, path, stage.num_steps)
        unfinished.unlink(missing_ok=True)
        minutes = (time.monotonic() - started) / 60
        print(f"{stage.name}: trained in {minutes:.1f} minutes", flush=True)


def _keep(model: PreTrainedModel, heads: nn.ModuleDict, path: Path, step: int) -> None:
    state = {"model": model.state_dict(), "heads": heads.state_dict(), "step": step}
    torch.save(state, path)


def save_checkpoint(model: PreTrainedModel, processor: ProcessorMixin, out: Path) -> None:
    """Write the model in bfloat16 and the processor as transformers loads them."""
    rounded = type(model)(model.config).to(torch.bfloat16)
    rounded.load_state_dict(model.state_dict())
    rounded.generation_config.do_sample = False
    rounded.save_pretrained(out)
    processor.save_pretrained(out)
    processor.image_processor.save_pretrained(out)
