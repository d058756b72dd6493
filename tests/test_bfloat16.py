"""In bfloat16, logits stay near transformers' float32 ones on the same checkpoint.

The tolerance: over all tokens of an answer, the root-mean-square difference is at most 2.5%
of the float32 logits' standard deviation, and no single logit is off by more than 12% of it.
bfloat16 keeps 8 bits: each rounding is off by up to 0.4%, and two layers' roundings add up.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from checkpoints import BACKBONES, TOWERS, make_llava, make_llava_next
from mm_engine import LLM, SamplingParams
from mm_engine.sequence import Sequence
from mm_engine.worker.sampler import Sampled
from parity import Case, Oracle, picture

RMS_TOLERANCE = 0.025  # measured: up to 0.016
MAX_TOLERANCE = 0.12  # measured: up to 0.074
CASES = (
    Case("Hello there, what is in the"),
    Case("USER: <image>\nWhat is in the picture? ASSISTANT:", (picture(1),)),
    Case("a <image> b <image><image> c", (picture(1), picture(2), picture(3))),
)


def logits_of(llm: LLM, case: Case, num_tokens: int) -> tuple[list[int], torch.Tensor]:
    """The engine's greedy answer and the logits `[num_tokens, vocab]` that it was taken from."""
    sampler = llm.engine.runner._runner.sampler  # type: ignore[attr-defined]
    launch, seen = type(sampler).launch, []

    def watched(logits: torch.Tensor, sequences: list[Sequence]) -> Sampled:
        seen.append(logits.float())
        return launch(sampler, logits, sequences)

    sampler.launch = watched
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    output = llm.generate(case.as_prompt(), params)[0]
    del sampler.launch
    return output.outputs[0].token_ids, torch.cat(seen)


@pytest.mark.parametrize("make", [make_llava, make_llava_next])
@pytest.mark.parametrize(("backbone", "tower"), list(product(BACKBONES, TOWERS)))
def test_logits_are_near_float32s(
    make: Callable[..., Path], backbone: str, tower: str, tmp_path: Path
) -> None:
    path = make(tmp_path, backbone=backbone, tower=tower, seed=1)  # no answer writes <image>
    oracle = Oracle(path)
    llm = LLM(str(path), dtype="bfloat16", progress=False)
    for case in CASES:
        answer, got = logits_of(llm, case, 24)
        expected = oracle.logits(case, answer[:-1])
        difference, scale = got - expected, expected.std()
        assert difference.pow(2).mean().sqrt() / scale < RMS_TOLERANCE
        assert difference.abs().max() / scale < MAX_TOLERANCE
