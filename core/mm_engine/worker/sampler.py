"""Choosing each sequence's next token. No row depends on another: not its noise, not its masks."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from mm_engine_kernels import ops
from torch import Tensor

from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import UNKNOWN_TOKEN, SampledToken, Sequence
from mm_engine.worker.grammars import Grammars, GrammarState, forbid
from mm_engine.worker.transfers import HostCopy, to_device


@dataclass(slots=True)
class SamplerState:
    """What sampling remembers of one sequence between steps."""

    generator: torch.Generator  # on the CPU: one number a token, the same on every device
    prompt_mask: Tensor | None = None  # [vocab] bool: ids that occur in the prompt
    output_counts: Tensor | None = None  # [vocab] float: how often each id was generated
    num_counted: int = 0  # output tokens that output_counts holds
    grammar: GrammarState | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """Log-probabilities of the rows that ask for them, W of N, up to `width` likeliest of each."""

    rows: list[int]  # [W]
    own: HostCopy  # [W] float: of the sampled ids
    ranks: HostCopy  # [W] int: 1 is the likeliest
    top: tuple[HostCopy, HostCopy] | None  # ids and values [W, width], likeliest first


@dataclass(frozen=True, slots=True)
class Sampled:
    """What was sampled, as far as the device has come: `tokens` waits for it."""

    ids: Tensor  # [N] int64, on the device
    params: list[SamplingParams]
    host_ids: HostCopy
    report: Report | None

    def tokens(self) -> list[SampledToken]:
        """One token for each row."""
        sampled = [SampledToken(token_id=token) for token in self.host_ids.tolist()]
        if self.report is None:
            return sampled
        own, ranks = self.report.own.tolist(), self.report.ranks.tolist()
        ids, values = [copy.tolist() for copy in self.report.top] if self.report.top else ([], [])
        for position, i in enumerate(self.report.rows):
            num = self.params[i].logprobs
            sampled[i].logprob, sampled[i].rank = own[position], ranks[position]
            sampled[i].top_logprobs = []
            if ids:
                pairs = zip(ids[position][:num], values[position][:num], strict=True)
                sampled[i].top_logprobs = list(pairs)
        return sampled


class Sampler:
    """Greedy and random sampling over a batch of rows, with each request's own parameters."""

    def __init__(self, seed: int, grammars: Grammars | None = None) -> None:
        """`grammars` follows those of requests for structured output."""
        self.seed = seed
        self._grammars = grammars
        self.num_unseeded = 0

    def sample(
        self,
        logits: Tensor,
        sequences: Seq[Sequence],
        accepted: Seq[Seq[int]] | None = None,
    ) -> list[SampledToken]:
        """One token for each row of `logits`: `launch`, and its tokens."""
        return self.launch(logits, sequences, accepted).tokens()

    def launch(
        self,
        logits: Tensor,
        sequences: Seq[Sequence],
        accepted: Seq[Seq[int]] | None = None,
    ) -> Sampled:
        """Sample one token for each row of `logits` `[N, vocab]`; `sequences[i]` owns row i.

        `accepted[i]` are the ids between the sequence's last token and the row, where its draft
        was right.

        A row should be finite, or -inf for an id that can't come. Of one that isn't comes some id
        of the vocabulary, and its neighbours don't notice. Log-probabilities are the model's,
        before penalties, temperature and cuts. Nothing here waits for the device, but a row with a
        grammar for the step before this one, while the device goes on with this one.
        """
        params = [sequence.request.sampling_params for sequence in sequences]
        if all(_is_plain(sequence) for sequence in sequences):
            chosen = ops.argmax(logits)
            return Sampled(chosen, params, HostCopy(chosen), None)
        logits = logits.float()
        wants_logprobs = [i for i, p in enumerate(params) if p.logprobs is not None]
        raw = logits.log_softmax(-1) if wants_logprobs else None
        adjusted = self._adjust(logits, sequences, accepted)
        chosen = ops.argmax(adjusted)
        random = [i for i, p in enumerate(params) if not p.greedy]
        if random:
            rows = to_device(random, logits.device)
            picked = self._draw(adjusted[rows], [sequences[i] for i in random])
            chosen = chosen.index_copy(0, rows, picked)
        report = None if raw is None else _report(raw, chosen, wants_logprobs, params)
        return Sampled(chosen, params, HostCopy(chosen), report)

    @contextmanager
    def unmoved_by_a_fault(self, sequences: Seq[Sequence]) -> Iterator[None]:
        """Whatever raises in here, the sequences draw next what they would have drawn before."""
        num_unseeded = self.num_unseeded
        states = [s.sampler_state and s.sampler_state.generator.get_state() for s in sequences]
        try:
            yield
        except BaseException:
            self.num_unseeded = num_unseeded
            for sequence, generator_state in zip(sequences, states, strict=True):
                state, sequence.sampler_state = sequence.sampler_state, None
                if generator_state is not None:  # counts are made anew when they are wanted
                    sequence.sampler_state = SamplerState(state.generator)
                    state.generator.set_state(generator_state)
            raise

    def _state(self, sequence: Sequence) -> SamplerState:
        if sequence.sampler_state is None:
            seed = sequence.request.sampling_params.seed
            if seed is None:
                self.num_unseeded += 1
                seed = (self.seed * 0x9E3779B97F4A7C15 + self.num_unseeded) % 2**63
            else:
                seed += sequence.index
            sequence.sampler_state = SamplerState(torch.Generator().manual_seed(seed))
        state: SamplerState = sequence.sampler_state
        return state

    def _adjust(
        self,
        logits: Tensor,
        sequences: Seq[Sequence],
        accepted: Seq[Seq[int]] | None = None,
    ) -> Tensor:
        """Apply penalties, logit_bias, min_tokens and grammars to the rows that ask for them."""
        adjusted = logits
        allowed: dict[int, Tensor] = {}  # by row: what grammars allow
        accepted = accepted or [()] * len(sequences)
        for i, sequence in enumerate(sequences):
            p = sequence.request.sampling_params
            penalised = (
                p.repetition_penalty != 1.0 or p.presence_penalty != 0 or p.frequency_penalty != 0
            )
            too_short = sequence.num_output_tokens + len(accepted[i]) < p.min_tokens
            grammar = sequence.request.grammar
            if not (penalised or too_short or p.logit_bias or grammar is not None):
                continue
            if adjusted is logits:
                adjusted = logits.clone()
            row = adjusted[i]
            if penalised:
                self._penalise(row, sequence, accepted[i], p)
            if p.logit_bias:
                ids = to_device(list(p.logit_bias), row.device)
                row[ids] += to_device(list(p.logit_bias.values()), row.device, row.dtype)
            if too_short:
                ends = [*p.stop_token_ids, *sequence.request.eos_token_ids]
                ends = [token for token in ends if token < row.shape[0]]
                row.index_fill_(0, to_device(ends, row.device), float("-inf"))
            if grammar is not None:
                allowed[i] = self._allowed(grammar, sequence, accepted[i])
        if allowed:
            forbid(adjusted, allowed)
        return adjusted

    def _allowed(self, grammar: bytes, sequence: Sequence, accepted: Seq[int]) -> Tensor:
        """Which ids the grammar allows next: `GrammarState.allowed`'s bits.

        Raises:
            RequestError: it allows nothing, or takes too long to follow.
        """
        assert self._grammars is not None
        state = self._state(sequence)
        if state.grammar is None:
            p = sequence.request.sampling_params
            kind = p.structured_outputs.kind if p.structured_outputs is not None else ""
            on_one_line = kind in ("json", "json_object")
            state.grammar = self._grammars.follow(grammar, p.n, on_one_line=on_one_line)
        ids = [*sequence.output_token_ids, *accepted]
        if ids and ids[-1] == UNKNOWN_TOKEN:  # what comes next hangs on it
            ids[-1] = sequence.newest.known()
        return state.grammar.allowed(ids)

    def _penalise(
        self, row: Tensor, sequence: Sequence, accepted: Seq[int], p: SamplingParams
    ) -> None:
        """OpenAI's presence and frequency penalties over the output; CTRL's repetition penalty
        (arXiv:1909.05858, as in transformers) over prompt and output. In place."""
        state = self._state(sequence)
        if state.output_counts is None or state.prompt_mask is None:
            state.output_counts = torch.zeros_like(row)
            state.prompt_mask = torch.zeros_like(row, dtype=torch.bool)
            prompt = [token for token in sequence.request.prompt_token_ids if token < row.shape[0]]
            state.prompt_mask.index_fill_(0, to_device(prompt, row.device), True)
        new = [*sequence.output_token_ids, *accepted][state.num_counted :]
        state.num_counted += len(new)
        if new and new[-1] == UNKNOWN_TOKEN:  # the device knows it
            ids = torch.cat((to_device(new[:-1], row.device), sequence.newest.on_device))
        else:
            ids = to_device(new, row.device)
        state.output_counts.index_add_(0, ids, torch.ones_like(ids, dtype=row.dtype))
        seen = state.output_counts > 0
        repeated = seen | state.prompt_mask
        scaled = torch.where(row > 0, row / p.repetition_penalty, row * p.repetition_penalty)
        row.copy_(torch.where(repeated, scaled, row))
        row -= p.frequency_penalty * state.output_counts + p.presence_penalty * seen

    def _draw(self, logits: Tensor, sequences: Seq[Sequence]) -> Tensor:
        """Draw one token for each row by inverting its cumulative distribution."""
        params = [sequence.request.sampling_params for sequence in sequences]
        device, vocab = logits.device, logits.shape[1]

        def column(values: list[float]) -> Tensor:
            return to_device(values, device, torch.float32)

        uniform = [
            torch.rand(1, generator=self._state(s).generator, dtype=torch.float64).item()
            for s in sequences
        ]
        return ops.sample(
            logits,
            to_device(uniform, device, torch.float64),
            column([p.temperature for p in params]),
            to_device([p.top_k if p.top_k > 0 else vocab for p in params], device),
            column([p.top_p for p in params]),
            column([p.min_p for p in params]),
        )


def _is_plain(sequence: Sequence) -> bool:
    """Whether the likeliest token is all that is asked for: a step of such needs one reading."""
    p = sequence.request.sampling_params
    return (
        p.greedy
        and p.logprobs is None
        and sequence.request.grammar is None
        and not p.logit_bias
        and not p.min_tokens
        and p.repetition_penalty == 1.0
        and p.presence_penalty == p.frequency_penalty == 0
    )


def _report(raw: Tensor, chosen: Tensor, wanted: list[int], params: list[SamplingParams]) -> Report:
    """What the rows in `wanted` ask to know, of log-probabilities `raw` `[N, vocab]`."""
    picked = to_device(wanted, raw.device)
    rows = raw[picked]
    own = rows.gather(1, chosen[picked][:, None])
    ranks = (rows > own).sum(-1) + 1
    width = min(max(params[i].logprobs or 0 for i in wanted), raw.shape[1])
    top = rows.topk(width, dim=-1) if width else None
    return Report(
        wanted,
        HostCopy(own.squeeze(1)),
        HostCopy(ranks),
        (HostCopy(top.indices), HostCopy(top.values)) if top is not None else None,
    )
