"""Noise that is held to a structure."""

from __future__ import annotations

from typing import Any

import torch

from mm_engine.request import Request
from mm_engine.sampling_params import SamplingParams, StructuredOutputsParams
from mm_engine.sequence import Sequence
from mm_engine.worker.grammars import Grammars
from mm_engine.worker.sampler import Sampler

EOS = 2  # of the demo


def answer(
    grammars: Grammars, tokenizer: Any, seed: int, max_tokens: int = 200, **structure: Any
) -> str | None:
    """What comes of noise that is held to a structure; None if its end isn't reached."""
    params = SamplingParams(
        seed=seed, structured_outputs=StructuredOutputsParams(**structure), max_tokens=max_tokens
    )
    assert params.structured_outputs is not None
    grammar = grammars.compile(params.structured_outputs)
    sequence = Sequence(Request("r", (1, 5, 6), params, grammar=grammar))
    sampler, noise = Sampler(0, grammars), torch.Generator().manual_seed(seed)
    for _ in range(max_tokens):
        logits = torch.randn(1, len(tokenizer), generator=noise) * 3
        logits[0, EOS] += 4.0  # noise is long-winded
        (token,) = sampler.sample(logits, [sequence])
        if token.token_id == EOS:
            return str(tokenizer.decode(sequence.output_token_ids))
        assert token.token_id is not None
        sequence.token_ids.append(token.token_id)
    return None
