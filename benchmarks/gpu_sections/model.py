"""Decode, prefill and the vision tower of the model, in the engine that serves it."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict
from typing import Any

import torch

from gpu_sections.measure import Row, Section, measure, queued, synchronize
from gpu_sections.run import Run
from gpu_sections.shapes import decode_bytes, decoder_flops, tower_flops
from mm_engine import SamplingParams
from mm_engine.request import Request
from mm_engine.sequence import ScheduledBatch, ScheduledSequence, Sequence

GREEDY = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
NUM_ROUNDS, WARM_UP = 3, 5
MAX_QUEUED = 8  # steps
SPARE = 40  # tokens: those whose prompt is read first are ahead of the others
DECODE_TARGET, PREFILL_TARGET, TOWER_TARGET, HIDDEN_TARGET = 0.85, 0.6, 0.5, 0.05


def decode(run: Run, out: Section) -> None:
    """Time per step of so many sequences, beside the bytes that a step reads at least.

    The wall clock over many steps of the whole engine: planning, launch, sampling, detokenizing,
    with the graphs and the overlap that it has by default. The floor is `decode_bytes` over the
    copy bandwidth. At the largest batch comes what of the host's time is not hidden: the share of a
    step of the engine that the device doesn't need for it (`device_seconds`).
    """
    info = run.llm.engine.info
    assert info is not None
    out.details |= {
        "async_scheduling": run.llm.engine.max_in_flight > 0,
        "attention": run.runner.backend.name,
        "graphs": run.runner.graphs is not None,
        "memory_bytes": asdict(info.memory),
        "block_size": info.block_size,
        "load_seconds": info.load_seconds,
        "profile_seconds": info.profile_seconds,
    }
    scale = run.scale
    for batch in scale.batches:
        seconds, context = engine_seconds(run, batch)
        floor = run.seconds_of_bytes(decode_bytes(scale, [context] * batch))
        out.against_time(f"decode, batch {batch}, context {context}", seconds, floor, DECODE_TARGET)
        on_device, ahead = device_seconds(run, batch, computed=context - 1, new=1)
        out.details[f"batch {batch}"] = {
            "engine_seconds": seconds,
            "device_seconds": on_device,
            "host_was_ahead": ahead,
        }
        if batch == max(scale.batches):
            hidden = max(0.0, seconds - on_device)
            share = hidden / seconds if ahead else None  # else it isn't known
            name = f"host time not hidden, batch {batch}"
            out.rows.append(
                Row(name, hidden * 1e3, "ms", None, share, "of the step", HIDDEN_TARGET, True)
            )


def engine_seconds(run: Run, batch: int) -> tuple[float, int]:
    """Wall time of one step of `batch` decodes in the engine, and their context meanwhile.

    Prompts are text: in decode an image's tokens are like others.
    """
    engine, scale = run.llm.engine, run.scale
    num_tokens = WARM_UP + NUM_ROUNDS * scale.num_steps + SPARE
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    names = [f"decode {batch} {i}" for i in range(batch)]
    try:
        for i, name in enumerate(names):
            engine.add(Request(name, tuple(prompt(i, scale.context)), params))
        begun: set[str] = set()
        while len(begun) < batch:
            for output in engine.step():
                if output.error is not None:
                    raise RuntimeError(output.error.message)
                begun.add(output.request_id)
        for _ in range(WARM_UP):
            engine.step()
        before = engine.stats().num_generation_tokens
        rounds = []
        for _ in range(NUM_ROUNDS):
            synchronize(run.device)
            start = time.perf_counter()
            for _ in range(scale.num_steps):
                engine.step()
            synchronize(run.device)
            rounds.append((time.perf_counter() - start) / scale.num_steps)
        made = engine.stats().num_generation_tokens - before
        if made != NUM_ROUNDS * scale.num_steps * batch:
            raise RuntimeError(f"steps were not all of {batch} decodes: {made} tokens came of them")
    finally:
        for name in names:
            engine.abort(name, notify=False)
        while engine.has_work:
            engine.step()
    middle = scale.context + WARM_UP + NUM_ROUNDS * scale.num_steps // 2
    return statistics.median(rounds), middle


def device_seconds(run: Run, batch: int, *, computed: int, new: int) -> tuple[float, bool]:
    """Seconds that the device needs for one step, the host's time left out.

    The step is one of `batch` sequences that have `computed` tokens in the cache and compute `new`
    ones. It is launched again and again by the engine's own runner, with all that it does for a
    step but the planning, while the device is held; then CUDA events measure how long the device
    takes for the steps that stand in its queue. Each writes the same slots, so nothing depends on
    how often. The bool says whether the host got ahead: if not, not even for a single step, its
    time is in the figure. On a CPU there is nothing to queue, and it is the wall time of a launch
    with its result.
    """
    step = plan(run, batch, computed, new)
    launch = run.runner.launch  # not the engine's barrier, which would run what fails otherwise
    tokens = launch(step).result().tokens
    failed = [token.error for token in tokens if token.error is not None]
    if failed:
        raise RuntimeError(failed[0].message)
    if run.device.type != "cuda":
        return measure(lambda: launch(step).result(), run.device), True
    torch.cuda.synchronize(run.device)
    start = time.perf_counter()
    launched = launch(step)
    seconds = time.perf_counter() - start
    launched.result()
    whole = time.perf_counter() - start
    # Few where a step is long, and fewer where the stream has no room for so many launches.
    most = max(1, min(MAX_QUEUED, int(0.2 / whole)))
    rounds: list[tuple[float, bool]] = []
    for num_calls in sorted({most, -(-most // 2), -(-most // 4), 1}, reverse=True):
        # But for the first, in which memory for results on their way is allocated, which waits.
        rounds = [
            queued(lambda: launch(step), run.device, num_calls, seconds * num_calls)
            for _ in range(5)
        ][1:]
        ahead = [taken for taken, was_ahead in rounds if was_ahead]
        if ahead:
            return statistics.median(ahead), True
    return statistics.median(taken for taken, _ in rounds), False


def plan(run: Run, batch: int, computed: int, new: int) -> ScheduledBatch:
    """A step of `batch` sequences; their blocks are the cache's first, which nobody else has."""
    info = run.llm.engine.info
    assert info is not None and not run.llm.engine.has_work
    each = -(-(computed + new) // info.block_size)
    if batch * each > info.num_blocks:
        raise RuntimeError(f"the cache has {info.num_blocks} blocks, and {batch * each} are needed")
    shares = []
    for i in range(batch):
        sequence = Sequence(Request(f"step {i}", tuple(prompt(i, computed + new)), GREEDY))
        sequence.num_computed_tokens = computed
        sequence.block_table = list(range(i * each, (i + 1) * each))
        shares.append(ScheduledSequence(sequence, new))
    return ScheduledBatch(tuple(shares))


def prefill(run: Run, out: Section) -> None:
    """FLOP/s of the decoder over all prompts in one step, and of the same as whole requests.

    The first is the device's time for the step (`device_seconds`), of text as long as image and
    text are; nothing is found in a cache. The second is the wall time of `LLM.generate` with a
    token each, images mapped and encoded, and has no target.
    """
    scale = run.scale
    length = scale.num_patches + scale.num_text
    lens = [length] * scale.num_prefills
    best = run.floor("matrix_flops_per_second")
    seconds, ahead = device_seconds(run, scale.num_prefills, computed=0, new=length)
    flops = decoder_flops(scale, lens)
    out.details |= {"decoder_flops": flops, "decoder_seconds": seconds, "host_was_ahead": ahead}
    name = f"prefill, {scale.num_prefills} × ({scale.num_patches} image + {scale.num_text} text)"
    out.against_rate(f"{name}, decoder", flops / seconds, best, PREFILL_TARGET)
    rounds = []
    for turn in range(NUM_ROUNDS + 1):
        prompts = image_prompts(run, [scale.num_text] * scale.num_prefills, seed=turn)
        start = time.perf_counter()
        outputs = run.llm.generate(prompts, GREEDY, use_tqdm=False)
        synchronize(run.device)
        rounds.append(time.perf_counter() - start)
        check(outputs)
    seconds = statistics.median(rounds[1:])
    flops += tower_flops(scale, scale.num_prefills)
    out.details["requests_seconds"] = seconds
    out.against_rate(f"{name}, whole requests", flops / seconds, best)


def tower(run: Run, out: Section) -> None:
    """FLOP/s of the vision tower and the projector over the images of the prefill."""
    scale = run.scale
    shape = (scale.num_prefills, 3, scale.image_size, scale.image_size)
    pixels = torch.randn(shape, device=run.device, dtype=run.dtype)

    def embed() -> Any:
        with torch.inference_mode():
            return run.runner.model.embed_images(pixel_values=pixels)

    seconds = measure(embed, run.device)
    flops = tower_flops(scale, scale.num_prefills)
    out.details |= {"tower_flops": flops, "tower_seconds": seconds}
    best = run.floor("matrix_flops_per_second")
    name = f"vision tower, {scale.num_prefills} images"
    out.against_rate(name, flops / seconds, best, TOWER_TARGET)


def prompt(index: int, num_tokens: int) -> list[int]:
    """BOS and byte tokens, others for each index."""
    return [1, *(10 + (i * 7 + index * 13) % 200 for i in range(num_tokens - 1))]


def image_prompts(run: Run, num_text: list[int], seed: int) -> list[Any]:
    """For `LLM.generate`: BOS, an image of noise that comes with no other seed, text."""
    import numpy as np
    from PIL import Image

    from checkpoint import IMAGE_TOKEN

    size = run.scale.image_size
    pixels = np.random.default_rng(seed).integers(
        0, 256, (len(num_text), size, size, 3), dtype=np.uint8
    )
    return [
        {
            "prompt_token_ids": [1, IMAGE_TOKEN, *prompt(i, num)[1:]],
            "multi_modal_data": {"image": Image.fromarray(pixels[i])},
        }
        for i, num in enumerate(num_text)
    ]


def check(outputs: list[Any]) -> None:
    """Raise RuntimeError if a request failed."""
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(output.error.message)
