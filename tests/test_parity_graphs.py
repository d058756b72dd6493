"""Decodes over padded tensors that stay in place give transformers' tokens, as eager ones do.

On a card these are CUDA graphs; without one, `graphing` calls the captured function again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from graphing import Replays, replaying
from mm_engine import LLM, SamplingParams
from mm_engine.attention.triton_paged import triton_fault
from parity import Case, Oracle, picture

#: Few, and of different lengths: Triton's interpreter runs its kernels in Python.
CASES = (
    (Case("USER: <image>\nWhat is it? ASSISTANT:", (picture(0, 24, 32),)), 4),
    (Case("Hello there, what is in the"), 8),
    (Case("x"), 6),
    (Case("How many objects are"), 3),
    (Case("Describe the"), 7),
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def can_replay(request: pytest.FixtureRequest) -> None:
    """Other ranks "capture" on a card only: `graphing` stands in within this process."""
    if DEVICE == "cpu" and request.config.getoption("--tensor-parallel-size") > 1:
        pytest.skip("without a card, graphs of several ranks can't be stood in for")


@pytest.fixture(scope="module")
def oracle(llava: Path) -> Oracle:
    return Oracle(llava)


@pytest.fixture(scope="module")
def answers(oracle: Oracle) -> list[list[int]]:
    return [oracle.answer(case, num) for case, num in CASES]


def run(path: Path, **options: Any) -> tuple[LLM, Replays, list[list[int]]]:
    if (fault := triton_fault(DEVICE)) is not None:
        pytest.skip(f"triton {fault}")
    with replaying() as replays:
        options = {
            "max_model_len": 64,
            "max_num_batched_tokens": 20,
            "max_num_seqs": 5,
            "block_size": 4,
            **options,
        }
        llm = LLM(
            str(path),
            dtype="float32",
            device=DEVICE,
            attention_backend="triton",
            progress=False,
            **options,
        )
        replays.steps.clear()
        outputs = llm.generate(
            [case.as_prompt() for case, _ in CASES],
            [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for _, n in CASES],
            use_tqdm=False,
        )
    assert all(output.error is None for output in outputs)
    return llm, replays, [list(output.outputs[0].token_ids) for output in outputs]


def check(oracle: Oracle, answers: list[list[int]], got: list[list[int]]) -> None:
    for (case, _), expected, answer in zip(CASES, answers, got, strict=True):
        oracle.check(case, expected, answer)


@pytest.mark.parametrize("overlaps", [False, True], ids=["one-by-one", "overlapping"])
def test_sequences_that_join_and_leave(
    llava: Path, oracle: Oracle, answers: list[list[int]], overlaps: bool
) -> None:
    _, replays, got = run(llava, async_scheduling=overlaps)
    check(oracle, answers, got)
    assert {size for size, _ in replays.steps} >= {2, 4, 5}
    assert any(num < size for size, num in replays.steps), "none between the ladder's rungs"


def test_preemption(llava: Path, oracle: Oracle, answers: list[list[int]]) -> None:
    bytes_per_token = 2 * 2 * 2 * 16 * 4  # layers, keys and values, heads, float32
    llm, replays, got = run(
        llava, max_num_batched_tokens=64, max_model_len=None, kv_cache_memory=72 * bytes_per_token
    )
    check(oracle, answers, got)
    assert llm.engine.stats().num_preemptions > 0
    assert replays.steps


def test_drafts_run_eagerly_among_replays(
    llava: Path, oracle: Oracle, answers: list[list[int]]
) -> None:
    llm, replays, got = run(llava, num_speculative_tokens=2, prompt_lookup_min=1)
    check(oracle, answers, got)
    assert llm.engine.stats().num_drafts > 0
    assert replays.steps


#: Loaded in each rank: there, too, graphs are "captured".
PLUGIN = """
from graphing import CallAgain
from mm_engine.worker.graphs import RECORDERS
from mm_llava.plugin import *

RECORDERS["cpu"] = CallAgain
"""


@pytest.mark.usefixtures("forked_ranks")
def test_two_ranks_replay_the_same_graphs(
    llava: Path, oracle: Oracle, answers: list[list[int]], tmp_path: Path
) -> None:
    plugin = tmp_path / "graphed.py"
    plugin.write_text(PLUGIN)
    llm, replays, got = run(llava, tensor_parallel_size=2, plugins=(str(plugin),))
    try:
        check(oracle, answers, got)
        assert {size for size, _ in replays.steps} >= {2, 4, 5}
    finally:
        llm.engine.runner.close()
