"""From an opened model to an engine that is ready: load, profile, size the KV cache."""

from __future__ import annotations

import logging
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from mm_engine import torch_threads
from mm_engine.config import EngineConfig
from mm_engine.engine.engine import Engine
from mm_engine.engine.pace import MIN_PROMPT_TOKENS, Pace
from mm_engine.engine.status import EngineInfo, MemoryInfo
from mm_engine.errors import EngineDead, PluginError, StartupError
from mm_engine.models.weights import does_not_fit
from mm_engine.plugins.blame import one_line
from mm_engine.request import Request
from mm_engine.worker.capture import GraphCapture
from mm_engine.worker.memory import readable
from mm_engine.worker.model_runner import ModelRunner

if TYPE_CHECKING:
    from mm_engine.worker.loader import OpenedModel

logger = logging.getLogger(__name__)

DEFAULT_ENCODER_CACHE = 128 * 2**20  # bytes
MOST_TRIAL_FLOPS = 2e11  # of the costliest prompt on a CPU: some cores take a second or two
UNTRIED_SHARE = 1 / 16  # of the weights' bytes: steps that weren't tried take less beside them
MAX_TIMING = 1.0  # seconds that timing steps may take, but for the last of them, ...
MIN_TIMED = 32  # ... and for those up to this many tokens: a decode's pace rests on them


def build_engine(opened: OpenedModel, config: EngineConfig, profile_request: Request) -> Engine:
    """Load the weights, run `profile_request` (the costliest prompt), allocate the KV cache.

    The engine's `info` says what came of it.

    Raises:
        StartupError: weights are missing, or no memory is left for the KV cache.
        PluginError: the plugin broke its contract on its own dummy data.
    """
    runner = ModelRunner(opened, config)
    tell_of_spinning(runner.device)
    try:
        return _build(runner, opened, config, profile_request)
    except EngineDead as error:  # nothing was served yet
        runner.close()
        raise StartupError(str(error)) from error
    except BaseException:
        runner.close()
        raise


def _build(
    runner: ModelRunner, opened: OpenedModel, config: EngineConfig, profile_request: Request
) -> Engine:
    ctx = opened.ctx
    config = replace(config, block_size=runner.block_size)  # as the backend takes it
    max_item_rows = max((opened.plugin.max_tokens(ctx, name) for name in ctx.limits), default=0)
    max_encoder_rows = num_encoder_rows(config, max_item_rows, runner.encoder.bytes_per_row)
    start = time.perf_counter()
    profile(runner, profile_request)
    capture = GraphCapture(runner, enforce_eager=config.enforce_eager, progress=config.progress)
    capture.try_out()
    num_blocks = num_cache_blocks(
        config,
        max_model_len=ctx.max_model_len,
        bytes_per_block=runner.cache_bytes_per_block,
        available=runner.available_memory() - max_encoder_rows * runner.encoder.bytes_per_row,
        is_cpu=runner.device.type == "cpu",
        graphs=runner.memory.graphs,
    )
    try:
        runner.init_cache(num_blocks)
    except (RuntimeError, MemoryError) as error:
        if not does_not_fit(error):
            raise
        taken = readable(num_blocks * runner.cache_bytes_per_block)
        raise StartupError(
            f"the KV cache doesn't fit in memory: {taken}. Lower --kv-cache-memory or "
            "--gpu-memory-utilization."
        ) from error
    capture.capture()
    memory = log_memory(runner, num_blocks)
    num_cache_tokens = num_blocks * config.block_size
    pace = make_pace(runner, config, max_tokens=min(num_cache_tokens, ctx.max_model_len))
    profile_seconds = time.perf_counter() - start
    engine = Engine(
        runner,
        replace(config, async_scheduling=overlaps_steps(config, runner.device.type)),
        ctx.tokenizer,
        num_blocks=num_blocks,
        max_model_len=ctx.max_model_len,
        max_encoder_rows=max_encoder_rows,
        pace=pace,
        slices_images=runner.slices_images,
        # Elsewhere a launch isn't the step, and nothing but slices depends on more than ratios.
        clock=time.perf_counter if runner.slices_images else None,
        model=f"{ctx.checkpoint} · {opened.plugin.label} · {ctx.architecture} · {ctx.dtype} · "
        f"{config.quantization} · {runner.cache_dtype}",
    )
    engine.info = EngineInfo(
        num_blocks=num_blocks,
        block_size=config.block_size,
        kv_cache_tokens=num_cache_tokens,
        max_model_len=ctx.max_model_len,
        dtype=str(ctx.dtype).removeprefix("torch."),
        device=str(runner.device),
        plugin=opened.plugin.label,
        architecture=ctx.architecture,
        num_parameters=runner.num_parameters,
        load_seconds=runner.load_seconds,
        profile_seconds=profile_seconds,
        memory=memory,
    )
    return engine


def tell_of_spinning(device: torch.device) -> None:
    """Warn of torch's threads where they wait in loops, on cores that the kernels' threads need."""
    if device.type == "cpu" and torch_threads.MAY_SPIN and torch.get_num_threads() > 1:
        logger.warning(
            "PyTorch was imported before mm_engine: its threads keep cores busy between operators, "
            "and an image's first token takes up to a third longer. Import mm_engine first, or set "
            "OMP_WAIT_POLICY=passive."
        )


def profile(runner: ModelRunner, request: Request) -> None:
    """Run the costliest prompt, and as many decodes as fit a step.

    On a CPU a large model would take longer for that than for all else of its start. There the
    prompt's text alone is run, and some decodes; the rest of a step's memory is estimated. That the
    model takes the mapper's tensors is seen in any case.

    Raises:
        StartupError: there is no memory for it.
        PluginError: the plugin broke its contract on its own dummy data.
    """
    num_flops = 2 * runner.num_parameters * len(request.prompt_token_ids)
    text = text_of(request)
    slow = runner.device.type == "cpu" and num_flops > MOST_TRIAL_FLOPS
    for item in request.items:  # those that aren't tried as well
        runner.check_keywords(item)
    try:
        if not slow or not text.prompt_token_ids:
            runner.profile([request])
        else:
            try:
                few = int(MOST_TRIAL_FLOPS / 4 / (2 * runner.num_parameters))
                runner.profile([text], max_num_seqs=max(1, few))
            except PluginError:  # some models take no text without an image
                runner.profile([request])
            else:
                runner.memory.peak += int(runner.weight_bytes * UNTRIED_SHARE)
                logger.info(
                    "Images aren't tried before the first one comes: here that takes a while "
                    "(%.1f TFLOP).",
                    num_flops / 1e12,
                )
    except (RuntimeError, MemoryError) as error:
        if not does_not_fit(error):
            raise
        raise StartupError(
            f"a step doesn't fit in memory beside the weights ({readable(runner.weight_bytes)}): "
            f"{one_line(error)}. Lower --max-num-batched-tokens, --max-num-seqs or "
            "--max-model-len, or serve the model where there is more."
        ) from error


def text_of(request: Request) -> Request:
    """The request without its items and their tokens."""
    images = {
        i for item in request.items for i in range(item.placeholder.offset, item.placeholder.end)
    }
    ids = tuple(id for i, id in enumerate(request.prompt_token_ids) if i not in images)
    return replace(request, prompt_token_ids=ids, items=())


def log_memory(runner: ModelRunner, num_blocks: int) -> MemoryInfo:
    """Say in one line what takes the memory of this process' device, and return it."""
    memory = MemoryInfo(
        weights=runner.weight_bytes,
        peak=runner.memory.peak,
        outside=runner.memory.outside,
        graphs=runner.memory.graphs,
        kv_cache=num_blocks * runner.cache_bytes_per_block,
    )
    parts = [f"weights {readable(memory.weights)}", f"peak of a step {readable(memory.peak)}"]
    if runner.device.type != "cpu":
        parts += [
            f"beside PyTorch {readable(memory.outside)}",
            f"CUDA graphs {readable(memory.graphs)}",
        ]
    logger.info(
        "Memory: %s, KV cache %s (%s blocks of %d tokens)",
        ", ".join(parts),
        readable(memory.kv_cache),
        f"{num_blocks:,}",
        runner.block_size,
    )
    return memory


def overlaps_steps(config: EngineConfig, device: str) -> bool:
    """Whether each step is prepared while the device computes the one before it."""
    if config.async_scheduling is not None:
        return config.async_scheduling
    if device == "cpu":  # its steps are computed where they are launched
        return False
    if config.num_speculative_tokens:
        logger.info("Steps are prepared one by one: drafts wait for the tokens before them.")
        return False
    return True


def make_pace(runner: ModelRunner, config: EngineConfig, *, max_tokens: int) -> Pace | None:
    """What the config's `max_decode_slowdown` means on this machine, by measuring some steps."""
    if math.isinf(config.max_decode_slowdown):
        return None
    start, times = time.perf_counter(), list[tuple[int, float]]()
    try:
        for num_tokens, seconds in runner.time_steps(
            min(max_tokens, config.max_num_batched_tokens)
        ):
            times.append((num_tokens, seconds))
            # Steps that no pace allows needn't be timed, nor any once startup would drag on:
            # what lies behind the last, `Pace` overestimates.
            at_most = [took for size, took in times if size <= config.max_num_seqs][-1]
            if seconds > config.max_decode_slowdown * at_most:
                break
            if num_tokens >= MIN_TIMED and time.perf_counter() - start > MAX_TIMING:
                break
    except (PluginError, torch.OutOfMemoryError) as error:
        if not times:  # a model that takes no text without an image, say
            logger.warning(
                "Steps can't be timed: %s Prompts hold up answers without a limit.", error
            )
            return None
        logger.warning("Steps of more than %d tokens can't be timed: %s", times[-1][0], error)
    pace = Pace(times, config.max_decode_slowdown)
    limits = []
    for num_decodes in sorted({1, min(8, config.max_num_seqs), config.max_num_seqs}):
        seconds, spare = pace.seconds(num_decodes), pace.spare_seconds(num_decodes)
        num_tokens = pace.num_tokens_more(num_decodes, spare, config.max_num_batched_tokens)
        num_tokens = max(num_tokens, MIN_PROMPT_TOKENS)
        limits.append(f"{num_tokens} beside {num_decodes} decodes ({1000 * seconds:.1f} ms)")
    logger.info("Tokens of prompts in a step: up to %s.", ", ".join(limits))
    return pace


def num_encoder_rows(config: EngineConfig, max_item_rows: int, bytes_per_row: int) -> int:
    """How many rows of image features the encoder cache holds: `encoder_cache_memory`'s worth.

    Raises:
        StartupError: the largest item that the plugin allows doesn't fit.
    """
    if config.encoder_cache_memory is None:
        # Unless told otherwise, all that a step can take fits: then images are never waited for.
        least = max(config.max_num_batched_tokens, max_item_rows)
        return max(DEFAULT_ENCODER_CACHE // bytes_per_row, least)
    num_rows = config.encoder_cache_memory // bytes_per_row
    if num_rows < max(1, max_item_rows):
        raise StartupError(
            f"encoder_cache_memory is too small: {config.encoder_cache_memory} bytes. One image "
            f"takes up to {max_item_rows} tokens of {bytes_per_row} bytes: give at least "
            f"{max(1, max_item_rows) * bytes_per_row}."
        )
    return num_rows


def num_cache_blocks(
    config: EngineConfig,
    *,
    max_model_len: int,
    bytes_per_block: int,
    available: int,
    is_cpu: bool,
    graphs: int = 0,
) -> int:
    """How many blocks the KV cache gets, out of `available` bytes or `config.kv_cache_memory`.

    On a CPU, memory is shared with everybody else: never more than `max_num_seqs` sequences of
    full length can use. `graphs` are the bytes that CUDA graphs take beside what is available.

    Raises:
        StartupError: not even one block fits, or no sequence of the length that was asked for.
    """
    num_blocks = _num_fitting(config, bytes_per_block, available, graphs)
    blocks_per_sequence = -(-max_model_len // config.block_size)
    if num_blocks < blocks_per_sequence:
        num_tokens = num_blocks * config.block_size
        fact = (
            f"one sequence of {max_model_len} tokens takes "
            f"{readable(blocks_per_sequence * bytes_per_block)} of KV cache, and there is room for "
            f"{num_tokens} tokens ({readable(num_blocks * bytes_per_block)})"
        )
        if config.max_model_len is not None:
            more = "--kv-cache-memory" if config.kv_cache_memory else "--gpu-memory-utilization"
            raise StartupError(
                f"max_model_len doesn't fit in memory: {fact}. "
                f"Use --max-model-len {num_tokens}, or raise {more}."
            )
        # Nobody asked for the checkpoint's own length.
        logger.warning("Requests may have up to %d tokens: %s.", num_tokens, fact)
    if is_cpu and config.kv_cache_memory is None:
        num_blocks = min(num_blocks, config.max_num_seqs * blocks_per_sequence)
    return num_blocks


def _num_fitting(config: EngineConfig, bytes_per_block: int, available: int, graphs: int) -> int:
    if config.kv_cache_memory is not None:
        if config.kv_cache_memory < bytes_per_block:
            raise StartupError(
                f"kv_cache_memory is too small: {config.kv_cache_memory} bytes. "
                f"One block of {config.block_size} tokens takes {bytes_per_block} bytes."
            )
        return config.kv_cache_memory // bytes_per_block
    if available < bytes_per_block <= available + graphs:
        raise StartupError(
            f"CUDA graphs leave no memory for the KV cache: they take {readable(graphs)}. Lower "
            "--max-num-seqs, raise --gpu-memory-utilization, or use --enforce-eager."
        )
    if available < bytes_per_block:
        raise StartupError(
            f"No memory is left for the KV cache: {max(0, available)} bytes of the "
            f"{bytes_per_block} that one block takes. Raise memory_utilization, "
            "lower max_num_batched_tokens, or free memory."
        )
    return available // bytes_per_block
