"""Greedy tokens equal transformers' in float32 with each attention backend that can run here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mm_engine import LLM, SamplingParams
from mm_engine.attention.backend import Needs
from mm_engine.attention.select import BACKENDS
from parity import Case, Oracle, Trace, picture

#: Few: Triton's interpreter runs its kernels in Python.
NUM_TOKENS = 6
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
IMAGE = picture(0, 24, 32)
CASES = (
    Case("USER: <image>\nWhat is it? ASSISTANT:", (IMAGE,)),
    Case("Hello there, what is in the"),
    Case("x"),
)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CAPABILITY = torch.cuda.get_device_capability() if DEVICE.type == "cuda" else None


@pytest.fixture(scope="module")
def oracle(llava: Path) -> Oracle:
    return Oracle(llava)


@pytest.fixture(scope="module")
def answers(oracle: Oracle) -> list[list[int]]:
    answers = [oracle.answer(case, NUM_TOKENS) for case in CASES]
    assert len({token for answer in answers for token in answer}) > 8, "answers must vary"
    return answers


@pytest.mark.parametrize("kind", BACKENDS, ids=lambda kind: kind.name)
def test_chunks_mixed_steps_and_decodes(
    llava: Path, oracle: Oracle, answers: list[list[int]], kind: type
) -> None:
    needs = Needs([], DEVICE, torch.float32, torch.float32, 4, CAPABILITY)
    if (reason := kind.unfit(needs)) is not None:
        pytest.skip(f"{kind.name} {reason}")
    llm = LLM(
        str(llava),
        dtype="float32",
        device=DEVICE.type,
        attention_backend=kind.name,
        max_model_len=64,
        max_num_batched_tokens=14,
        block_size=4,
        progress=False,
    )
    trace = Trace.of(llm)
    outputs = llm.generate([case.as_prompt() for case in CASES], GREEDY, use_tqdm=False)
    for case, expected, output in zip(CASES, answers, outputs, strict=True):
        assert output.error is None
        oracle.check(case, expected, output.outputs[0].token_ids)
    assert trace.cut_images > 0
    assert trace.mixed_steps > 0
    assert trace.most_sequences == len(CASES)
