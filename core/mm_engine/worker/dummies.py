"""A step of decodes that takes as much as any, for the profile run."""

from __future__ import annotations

from dataclasses import replace

from mm_engine.config import EngineConfig
from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import ScheduledBatch, ScheduledSequence, Sequence

#: What keeps the most copies of the logits: penalties, log-probabilities, a draw. With a seed:
#: requests without one are counted.
COSTLIEST = SamplingParams(
    temperature=1.0, top_p=0.9, top_k=50, logprobs=1, frequency_penalty=0.1, max_tokens=1, seed=0
)


def most_decodes(sequence: Sequence, config: EngineConfig, *, max_tokens: int) -> ScheduledBatch:
    """As many decodes as a step may hold, with as long drafts, at the end of a computed sequence.

    All share its blocks: each writes there what the others do. Their contexts are its own, or less
    where a KV cache of `max_tokens` can't hold so many of them at once.
    """
    num_drafted = config.num_speculative_tokens
    num = max(1, min(config.max_num_seqs, config.max_num_batched_tokens // (1 + num_drafted)))
    length = max(1, min(sequence.num_tokens, max_tokens // num))
    num_drafted = min(num_drafted, length - 1)
    known = sequence.request.prompt_token_ids[: length - num_drafted]
    request = replace(sequence.request, prompt_token_ids=known, sampling_params=COSTLIEST)
    shares = []
    for _ in range(num):
        decode = Sequence(request)
        decode.block_table = sequence.block_table[:]
        decode.num_computed_tokens = len(known) - 1
        shares.append(ScheduledSequence(decode, 1, (0,) * num_drafted))
    return ScheduledBatch(tuple(shares))
