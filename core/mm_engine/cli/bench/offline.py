"""Latency and throughput of the engine in this process, without a server: `LLM.generate`."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mm_engine.cli.bench.workload import Shape, WordPool, Workload
from mm_engine.errors import MMEngineError, StartupError

if TYPE_CHECKING:
    from mm_engine import LLM
    from mm_engine.outputs import RequestOutput

WARM_UP = 1  # the stream of prompts that aren't measured
SAMPLE_SECONDS = 0.05


@dataclass(frozen=True, slots=True)
class LatencyRun:
    """Seconds of each batch, and the tokens of one prompt and one answer, images included."""

    seconds: list[float]
    prompt_tokens: float
    output_tokens: float


@dataclass(slots=True)
class ThroughputRun:
    """All prompts at once: what came of them, and how far they were at which time."""

    seconds: float
    num_prompts: int
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    failures: list[tuple[str, str]] = field(default_factory=list)  # class and message of each
    progress: list[tuple[float, int, int]] = field(default_factory=list)  # s, tokens, sequences


def workloads(llm: LLM, shape: Shape) -> tuple[Workload, Workload]:
    """The prompts to measure with, and others to warm up with.

    Raises:
        StartupError: the tokenizer has no plain words.
    """
    try:
        pool = WordPool(llm.pipeline.ctx.tokenizer, llm.pipeline.vocab_size)
    except ValueError as error:
        raise StartupError(f"{error} Take another checkpoint.") from None
    return Workload(shape, pool), Workload(shape, pool, stream=WARM_UP)


def prompts_of(llm: LLM, workload: Workload, indices: Iterable[int]) -> list[Any]:
    """Prompts for `LLM.generate`: the prefix, a placeholder for each image, the text."""
    context = llm.pipeline.ctx
    placeholders: list[int] = []
    for image in range(workload.shape.num_images):
        text = llm.pipeline.plugin.placeholder_text(context, "image", image)
        placeholders += workload.pool.encode(text)
    prefix = workload.prefix_ids()
    return [
        {
            "prompt_token_ids": [*prefix, *placeholders, *workload.text_ids(index)],
            "multi_modal_data": {"image": workload.images(index)},
        }
        for index in indices
    ]


def measure_latency(
    llm: LLM,
    shape: Shape,
    *,
    batch_size: int,
    num_iters: int,
    num_iters_warmup: int,
    tick: Callable[[], None],
) -> LatencyRun:
    """Answer one batch after another, each of new prompts; `tick` is called after each.

    Raises:
        RequestError: the prompts don't fit the model.
        MMEngineError: a request failed.
    """
    measured, warm_up = workloads(llm, shape)
    seconds: list[float] = []
    outputs: list[RequestOutput] = []
    for workload, count in ((warm_up, num_iters_warmup), (measured, num_iters)):
        for number in range(count):
            indices = range(number * batch_size, (number + 1) * batch_size)
            prompts = prompts_of(llm, workload, indices)
            start = time.perf_counter()
            answered = llm.generate(prompts, _params(shape), use_tqdm=False)
            elapsed = time.perf_counter() - start
            for output in answered:
                if output.error is not None:
                    raise MMEngineError(output.error.message)
            if workload is measured:
                seconds.append(elapsed)
                outputs += answered
            tick()
    return LatencyRun(
        seconds,
        sum(len(output.prompt_token_ids) for output in outputs) / len(outputs),
        sum(_num_tokens(output) for output in outputs) / len(outputs),
    )


def measure_throughput(
    llm: LLM, shape: Shape, *, num_prompts: int, num_warmups: int, progress: bool
) -> ThroughputRun:
    """Answer all prompts at once, as fast as it goes; a bar shows it if `progress`.

    Raises:
        RequestError: the prompts don't fit the model.
    """
    measured, warm_up = workloads(llm, shape)
    if num_warmups:
        llm.generate(prompts_of(llm, warm_up, range(num_warmups)), _params(shape), use_tqdm=False)
    prompts = prompts_of(llm, measured, range(num_prompts))
    with _Sampler(llm) as sampler:
        start = time.perf_counter()
        outputs = llm.generate(prompts, _params(shape), use_tqdm=progress)
        elapsed = time.perf_counter() - start
    run = ThroughputRun(elapsed, num_prompts, progress=sampler.samples)
    for output in outputs:
        if output.error is not None:
            run.failures.append((output.error.name, output.error.message))
            continue
        run.prompt_tokens += len(output.prompt_token_ids)
        run.cached_tokens += output.num_cached_tokens
        run.output_tokens += _num_tokens(output)
    return run


class _Sampler:
    """Looks at the engine's counters from time to time, from a thread of its own."""

    def __init__(self, llm: LLM) -> None:
        self.samples: list[tuple[float, int, int]] = []
        self._engine = llm.engine
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> _Sampler:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _run(self) -> None:
        start = time.perf_counter()
        before = self._engine.stats().num_generation_tokens
        done = False
        while not done:
            done = self._done.wait(SAMPLE_SECONDS)  # then once more: where it ended
            stats = self._engine.stats()
            tokens = stats.num_generation_tokens - before
            self.samples.append((time.perf_counter() - start, tokens, stats.num_running))


def _params(shape: Shape) -> Any:
    from mm_engine import SamplingParams

    return SamplingParams(temperature=0.0, max_tokens=shape.output_len, ignore_eos=True)


def _num_tokens(output: RequestOutput) -> int:
    return sum(len(completion.token_ids) for completion in output.outputs)
