"""Drafts against the model: what would have been sampled, position after position."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from mm_engine.sequence import SampledToken, ScheduledSequence
from mm_engine.worker.sampler import Sampled, Sampler
from mm_engine.worker.transfers import HostCopy, move


@dataclass(frozen=True, slots=True)
class Verified:
    """What was sampled where there were drafts: nothing of it is on its way any more."""

    ids: Tensor  # [N] the newest id of each share, on the device
    host_ids: HostCopy
    known: list[SampledToken]

    @classmethod
    def of(cls, known: list[SampledToken], device: torch.device) -> Verified:
        """Of tokens that the host knows already."""
        ids = torch.tensor([token.token_id for token in known], dtype=torch.int64)
        return cls(move(ids, device), HostCopy(ids), known)

    def tokens(self) -> list[SampledToken]:
        """One for each share."""
        return self.known


def launch_shares(
    sampler: Sampler, logits: Tensor, shares: Seq[ScheduledSequence]
) -> Sampled | Verified:
    """What each share's sequence goes on with: one token, and more as far as its draft is right.

    `logits` `[R, vocab]` holds, share after share, the row of the last known token and those of
    the draft.

    Each token is sampled as it would be in a step of its own, with the same random number and the
    penalties of all before it. If it is the draft's, the draft's row is that of the next step, and
    the next token is sampled from it; else it is the last. So a draft decides how many tokens a
    step brings, and never which. Where there are drafts, the device is waited for.
    """
    sequences = [share.sequence for share in shares]
    if not any(share.draft_token_ids for share in shares):
        return sampler.launch(logits, sequences)
    first_rows = [0, *accumulate(1 + len(share.draft_token_ids) for share in shares)]
    taken: list[list[SampledToken]] = [[] for _ in shares]
    going = list(range(len(shares)))
    with sampler.unmoved_by_a_fault(sequences):
        while going:
            rows = [first_rows[i] + len(taken[i]) for i in going]
            accepted = [_ids(taken[i]) for i in going]
            sampled = sampler.sample(logits[rows], [sequences[i] for i in going], accepted)
            for i, token in zip(going, sampled, strict=True):
                taken[i].append(token)
            going = [i for i in going if _is_right(shares[i], taken[i])]
    known = [replace(tokens[-1], accepted=tuple(tokens[:-1])) for tokens in taken]
    return Verified.of(known, logits.device)


def _is_right(share: ScheduledSequence, tokens: Seq[SampledToken]) -> bool:
    """Whether the draft says the newest of `tokens`, too."""
    number = len(tokens)
    drafted = share.draft_token_ids[number - 1 : number]
    return drafted == (tokens[-1].token_id,)


def _ids(tokens: Seq[SampledToken]) -> list[int]:
    return [token.token_id for token in tokens if token.token_id is not None]
