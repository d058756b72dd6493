"""Requests through a real engine in this process, watched: answers, logits, what was cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mm_engine.engine.engine import Engine
from mm_engine.engine.fault_barrier import Computed
from mm_engine.errors import PluginError
from mm_engine.plugins.blame import one_line
from mm_engine.request import PromptInputs, Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.sequence import ScheduledBatch

if TYPE_CHECKING:
    from PIL import Image

    from mm_engine.testing.subject import Subject
    from mm_engine.worker.model_runner import ModelRunner

BLOCK_SIZE = 16


@dataclass(slots=True)
class Watched:
    """The worker, as the engine calls it; notes what each request was answered with."""

    runner: ModelRunner
    tokens: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    logits: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    merged: dict[str, list[Tensor]] = field(default_factory=lambda: defaultdict(list))
    num_cut: int = 0  # steps that ended inside an image
    failure: BaseException | None = None  # what the plugin's model raised

    def launch(self, batch: ScheduledBatch) -> Computed:
        """Compute one step."""
        for share in batch.sequences:
            for item in share.sequence.request.items:
                self.num_cut += item.placeholder.offset < share.end < item.placeholder.end
        seen: dict[str, Tensor] = {}
        try:
            with _spied(self.runner.model, seen):
                result = self.runner.run(batch)
        except BaseException as error:
            self.failure = error
            raise
        if any(token.error is not None for token in result.tokens):
            return Computed(result)
        sampling = [share for share in batch.sequences if share.samples]
        for share, row in zip(sampling, seen.get("logits", ()), strict=True):
            self.logits[share.sequence.request.request_id].append(row.clone())
        embeds = seen["embeds"].split([share.num_new_tokens for share in batch.sequences])
        for share, rows in zip(batch.sequences, embeds, strict=True):
            self.merged[share.sequence.request.request_id].append(rows.clone())
        return Computed(result)

    def check(self) -> None:
        """See `Runner`."""

    def close(self) -> None:
        """See `Runner`; the subject's runner lives on."""


@contextmanager
def _spied(model: Any, seen: dict[str, Tensor]) -> Iterator[None]:
    """Note what `forward` is given and `compute_logits` returns, for one step."""
    forward, compute_logits = model.forward, model.compute_logits

    def watch_forward(*args: Any, **kwargs: Any) -> Any:
        seen["embeds"] = kwargs["inputs_embeds"].clone()
        return forward(*args, **kwargs)

    def watch_logits(hidden: Tensor) -> Any:
        seen["logits"] = compute_logits(hidden)
        return seen["logits"]

    model.forward, model.compute_logits = watch_forward, watch_logits
    try:
        yield
    finally:
        del model.forward, model.compute_logits


class EngineRun:
    """One engine over the subject's model, with an empty cache."""

    def __init__(self, subject: Subject, num_tokens: int, max_num_batched_tokens: int) -> None:
        """Make room for `num_tokens` tokens; a step takes up to `max_num_batched_tokens`."""
        self.subject = subject
        self.watched = Watched(subject.runner)
        num_blocks = -(-num_tokens // BLOCK_SIZE) + 16
        subject.runner.block_size = BLOCK_SIZE
        subject.runner.encoder.features.clear()
        subject.runner.init_cache(num_blocks)
        most = subject.plugin.max_tokens(subject.ctx, "image")
        config = subject.opened.config
        config = type(config)(
            model=config.model,
            max_num_batched_tokens=max_num_batched_tokens,
            block_size=BLOCK_SIZE,
            enable_prefix_caching=False,  # a prompt computed before wouldn't reach the model
            progress=False,
        )
        self.engine = Engine(
            self.watched,
            config,
            subject.ctx.tokenizer,
            num_blocks=num_blocks,
            max_model_len=subject.ctx.max_model_len,
            max_encoder_rows=max(max_num_batched_tokens, 4 * most),
        )

    def answer(self, requests: Sequence[Request]) -> None:
        """Run `requests` together to their end; what they got is in `watched`.

        Raises:
            PluginError: one of them failed.
        """
        for request in requests:
            self.engine.add(request)
        while self.engine.has_work:
            for output in self.engine.step():
                if output.error is not None:
                    self._raise(output.error.message)
                for new in output.outputs:
                    self.watched.tokens[output.request_id] += new.token_ids

    def _raise(self, message: str) -> None:
        cause = self.watched.failure
        if cause is None or isinstance(cause, PluginError):
            raise PluginError(message)
        raise self.subject.plugin.blame("forward", f"raised {one_line(cause)}", cause) from cause


def answered(
    subject: Subject,
    requests: Sequence[Request],
    *,
    max_num_batched_tokens: int = 1 << 16,
    one_by_one: bool = False,
) -> tuple[Watched, Engine]:
    """Run `requests` through a fresh engine, together or each after the last one's end."""
    total = sum(
        len(request.prompt_token_ids) + (request.sampling_params.max_tokens or 0) + BLOCK_SIZE
        for request in requests
    )
    run = EngineRun(subject, total, max_num_batched_tokens)
    for group in [[request] for request in requests] if one_by_one else [list(requests)]:
        run.answer(group)
    return run.watched, run.engine


def request_of(
    subject: Subject,
    ids: Sequence[int],
    images: Sequence[Image.Image],
    num_tokens: int,
    name: str,
) -> Request:
    """A greedy request of `num_tokens` tokens that no end of sequence cuts short."""
    inputs = PromptInputs(prompt_token_ids=tuple(ids), multi_modal_data={"image": tuple(images)})
    params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
    return subject.pipeline.request(subject.pipeline.prepare(inputs), params, name)
