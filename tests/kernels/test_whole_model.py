"""A model whose every op is a Triton kernel gives transformers' tokens."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_engine_kernels import ops
from torch import Tensor

from mm_engine import LLM, SamplingParams
from mm_engine.attention.backend import Attention
from mm_engine.attention.metadata import AttentionMetadata
from parity import Case, Oracle, picture

NUM_TOKENS = 6


class PagedAttention:
    """The plainest way from a step to the kernels."""

    name = "kernels"

    def __init__(self) -> None:
        self.steps = {"decode": 0, "prefill": 0}

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layer: Attention,
        metadata: AttentionMetadata,
    ) -> Tensor:
        caches = metadata.kv_caches[layer.layer_index]
        ops.write_kv(key, value, *caches, metadata.slot_mapping)
        lens, contexts = metadata.query_lens, metadata.context_lens
        context_lens = torch.tensor(contexts, dtype=torch.int32, device=query.device)
        common = (query, *caches, metadata.block_tables)
        options = (layer.scale, layer.sliding_window, layer.softcap)
        if max(lens) == 1:
            self.steps["decode"] += 1
            return ops.paged_decode(*common, context_lens, *options, max_context_len=max(contexts))
        self.steps["prefill"] += 1
        starts = torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=query.device)
        return ops.paged_prefill(*common, starts, context_lens, *options, max_query_len=max(lens))


def test_llava_in_kernels_answers_as_transformers(
    llava: Path, kernels: Any, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests, one with a picture, prefilled in chunks beside each other's decodes."""
    used: dict[str, int] = dict.fromkeys(ops.OPS, 0)
    counted: dict[str, Any] = {}
    for name in ops.OPS:

        def count(*args: Any, _name: str = name, **options: Any) -> Any:
            used[_name] += 1
            return getattr(kernels, _name)(*args, **options)

        counted[name] = staticmethod(count)
    monkeypatch.setitem(ops._kernels, device, type("Counted", (), counted))
    cases = (
        Case("What is in the"),
        Case("USER: <image>\nWhat is in the picture? ASSISTANT:", (picture(1),)),
    )
    oracle = Oracle(llava)
    llm = LLM(str(llava), dtype="float32", progress=False, max_num_batched_tokens=24)
    runner: Any = llm.engine.runner._runner
    backend = runner.backend = PagedAttention()
    before = dict(used)  # what startup has run doesn't count
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    drawn = SamplingParams(seed=1, max_tokens=2, top_p=0.9, top_k=9, ignore_eos=True)
    prompts = [case.as_prompt() for case in cases]
    outputs = llm.generate([*prompts, prompts[0]], [greedy, greedy, drawn])
    for case, output in zip(cases, outputs, strict=False):
        assert output.error is None
        expected = oracle.answer(case, NUM_TOKENS)
        oracle.check(case, expected, output.outputs[0].token_ids)
    assert all(used[name] > before[name] for name in ops.TRITON_FILES), used
    assert backend.steps["decode"] and backend.steps["prefill"]
