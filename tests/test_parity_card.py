"""The engine on a card that isn't there: transformers' tokens, and no wait but one that is known.

This runs what else only a card runs: copies of pinned memory, events, decodes that are captured and
replayed, the tiles that launchers choose for a card, tensors that must be on it. Whether a card's
compiler and its own kernels compute the same, it can't tell (tests/kernels, and tests on a card).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import Version
from torch import Tensor

from checkpoints import make_llava, make_llava_next
from flash_stand_ins import standing_in
from mm_engine import LLM, SamplingParams
from mm_engine.attention.triton_paged import triton_fault
from mm_engine.engine.fault_barrier import FaultBarrier
from mm_engine.sampling_params import StructuredOutputsParams
from parity import Case, Oracle, picture
from pretend_card import Card
from pretend_cuda import pretending
from test_bfloat16 import MAX_TOLERANCE, RMS_TOLERANCE, logits_of

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card"),
    pytest.mark.skipif(triton_fault("cpu") is not None, reason="needs Triton and its interpreter"),
]

#: Few, and of different lengths: Triton's interpreter runs its kernels in Python.
CASES = (
    (Case("USER: <image>\nWhat is it? ASSISTANT:", (picture(0, 24, 32),)), 4),
    (Case("Hello there, what is in the"), 8),
    (Case("x"), 6),
    (Case("How many objects are"), 3),
    (Case("What is <image> and <image>?", (picture(1), picture(2, 50, 20))), 5),
)
#: A step that encodes asks once whether the features are finite; LLaVA-NeXT's model reads sizes.
KNOWN_WAITS = (
    "finite = torch.stack([rows.isfinite().all() for rows in checked]).tolist()",
    "layouts = [layout(self.config, *size) for size in image_sizes.tolist()]",
)

POISON = 77  # the token whose embedding is NaN

OPTIONS: dict[str, Any] = {
    "dtype": "float32",
    "max_model_len": 64,
    "max_num_batched_tokens": 20,
    "max_num_seqs": 5,
    "block_size": 4,
    "kv_cache_memory": 2**20,
    "progress": False,
}


@pytest.fixture(autouse=True)
def alone(request: pytest.FixtureRequest) -> None:
    """Other ranks would have to pretend, too."""
    if request.config.getoption("--tensor-parallel-size") > 1:
        pytest.skip("the card that is pretended is one, in one process")


@pytest.fixture(autouse=True)
def no_step_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that raises is run again, a sequence at a time, which would hide what is wrong."""

    def fail(*_: Any) -> None:
        raise AssertionError("a step failed: the log has why")

    monkeypatch.setattr(FaultBarrier, "_run_each_alone", fail)


def serve(card: Card, path: Path, **options: Any) -> LLM:
    """The engine on the card, of which is known from then on what it waits for."""
    given = {"attention_backend": "triton", **OPTIONS, **options}
    llm = LLM(str(path), device="cuda", **given)
    card.waits.clear()
    card.num_replays = 0
    return llm


def answer(llm: LLM, cases: Any = CASES) -> list[list[int]]:
    outputs = llm.generate(
        [case.as_prompt() for case, _ in cases],
        [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for _, n in cases],
        use_tqdm=False,
    )
    assert all(output.error is None for output in outputs), [output.error for output in outputs]
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_waits(card: Card, *, most: int = 3) -> None:
    """Only for features was the device waited for, so often at most: there are three images."""
    others = [wait for wait in card.waits if not wait.where.endswith(KNOWN_WAITS)]
    assert not others, "\n".join(f"{wait.what}: {wait.lines[-3:]}" for wait in others)
    assert 0 < len(card.waits) <= most


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama-siglip": {"tower": "siglip", "feature_layer": -1, "strategy": "full"},
    "mistral-window": {"backbone": "mistral", "text_changes": {"sliding_window": 7}},
    "qwen2": {"backbone": "qwen2"},
    "gemma2-of-transformers": {"backbone": "gemma2"},
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_tokens(tmp_path: Path, name: str) -> None:
    path = make_llava(tmp_path, **CHECKPOINTS[name])
    with pretending() as card:
        got = answer(serve(card, path))
    oracle = Oracle(path)
    for (case, num), ids in zip(CASES, got, strict=True):
        oracle.check(case, oracle.answer(case, num), ids)
    assert card.num_replays and card.num_kernels
    check_waits(card)


def test_tiles_of_llava_next(tmp_path: Path) -> None:
    path = make_llava_next(tmp_path)
    cases = (
        (Case("A <image>", (picture(3, 30, 14),)), 3),
        (Case("<image><image> differ?", (picture(4, 14, 40), picture(5, 28, 28))), 4),
    )
    with pretending() as card:
        llm = serve(card, path, max_model_len=256, max_num_batched_tokens=64)
        got = answer(llm, cases)
    oracle = Oracle(path)
    for (case, num), ids in zip(cases, got, strict=True):
        oracle.check(case, oracle.answer(case, num), ids)
    check_waits(card, most=6)


@pytest.mark.parametrize("backend", ["flash-attn", "varlen"])
def test_attention_that_only_cards_have(llava: Path, backend: str) -> None:
    """In bfloat16, which is what they take: logits are held to their tolerance in that."""
    if backend == "varlen" and Version(torch.__version__) < Version("2.13"):
        pytest.skip("varlen_attn reads no paged cache before torch 2.13")
    seen: list[tuple[Case, list[int], torch.Tensor]] = []
    with pretending() as card:

        def kernel(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
            return functools.wraps(function)(card.kernel(function, allocates=True))

        with standing_in(kernel):
            options = {"dtype": "bfloat16", "attention_backend": backend}
            llm = serve(card, llava, **options, kv_cache_memory=2**21, max_num_seqs=2)
            for case, num in CASES[:2]:
                answer, logits = logits_of(llm, case, num)
                seen.append((case, answer, logits.cpu()))
    oracle = Oracle(llava)
    for case, answer, got in seen:
        expected = oracle.logits(case, answer[:-1])
        difference, scale = got - expected, expected.std()
        assert difference.pow(2).mean().sqrt() / scale < RMS_TOLERANCE
        assert difference.abs().max() / scale < MAX_TOLERANCE
    assert bool(card.num_replays) == (backend == "flash-attn")  # varlen isn't captured


VARIANTS: dict[str, dict[str, Any]] = {
    "one by one": {"async_scheduling": False},
    "eager": {"enforce_eager": True},
    "without caches": {"enable_prefix_caching": False, "max_num_batched_tokens": 7},
    "preempted": {"kv_cache_memory": 72 * 512, "max_num_batched_tokens": 64, "max_model_len": 60},
    "drafts": {"num_speculative_tokens": 2, "prompt_lookup_min": 1},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
}
#: As the host's answers: what quantises or rounds differs from transformers in the same way.
PARAMS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 2, "min_tokens": 4, "repetition_penalty": 1.4},
    {"temperature": 1.0, "seed": 3, "top_p": 0.9, "logprobs": 1},
    {"temperature": 0.8, "seed": 5, "frequency_penalty": 1.2, "top_k": 30, "n": 2},
    {"temperature": 1.2, "seed": 9, "presence_penalty": -0.5, "logit_bias": {77: 4.0}},
    {"temperature": 0.9, "seed": 2, "structured_outputs": {"regex": "[a-z]{9,}"}, "min_p": 0.01},
)


def sample(llm: LLM) -> list[Any]:
    prompts = [case.as_prompt() for case, _ in CASES]
    params = []
    for given in PARAMS:
        options = dict(given)
        if structure := options.pop("structured_outputs", None):
            options["structured_outputs"] = StructuredOutputsParams(**structure)
            options["ignore_eos"] = False
        params.append(SamplingParams(max_tokens=7, **{"ignore_eos": True, **options}))
    outputs = llm.generate([*prompts, prompts[1]], params, use_tqdm=False)
    return [
        output.error or [(list(one.token_ids), one.finish_reason) for one in output.outputs]
        for output in outputs
    ]


@pytest.mark.parametrize("variant", VARIANTS)
def test_all_that_can_be_asked_for_is_answered_as_on_the_host(llava: Path, variant: str) -> None:
    options = VARIANTS[variant]
    on_host = sample(LLM(str(llava), device="cpu", **{**OPTIONS, **options}))
    assert all(isinstance(one, list) for one in on_host), on_host
    with pretending() as card:
        llm = serve(card, llava, **options)
        on_card = sample(llm)
        preempted = llm.engine.stats().num_preemptions
    assert on_card == on_host
    assert bool(card.num_replays) == (variant != "eager")
    assert bool(preempted) == (variant == "preempted")
    if variant != "drafts":
        check_waits(card)


def test_numbers_that_are_none_cost_their_request_alone(llava: Path) -> None:
    with pretending() as card:
        llm = serve(card, llava, max_num_seqs=3)
        expected = answer(llm, CASES[1:3])
        runner: Any = llm.engine.runner._runner
        runner.model.language_model.embedding.weight.host[POISON] = float("nan")
        bad = {"prompt_token_ids": [1, 5, POISON, 6]}
        prompts = [*(case.as_prompt() for case, _ in CASES[1:3]), bad]
        params = [SamplingParams(temperature=0.0, max_tokens=n, ignore_eos=True) for n in (8, 6, 5)]
        outputs = llm.generate(prompts, params, use_tqdm=False)
    assert [list(one.outputs[0].token_ids) for one in outputs[:2]] == expected
    assert outputs[2].error is not None and "NaN" in outputs[2].error.message
