from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from checkpoints import make_llava
from mm_engine import LLM, SamplingParams
from mm_engine.config import EngineConfig
from mm_engine.engine import build
from mm_engine.engine.build import (
    make_pace,
    num_cache_blocks,
    num_encoder_rows,
    overlaps_steps,
)
from mm_engine.errors import PluginError, StartupError
from mm_engine.request import Item, PlaceholderRange, Request


def blocks(available: int = 10**6, *, is_cpu: bool = True, **options: Any) -> int:
    config = EngineConfig(model="none", block_size=16, max_num_seqs=4, **options)
    return num_cache_blocks(
        config, max_model_len=100, bytes_per_block=1000, available=available, is_cpu=is_cpu
    )


def test_on_a_gpu_the_cache_takes_all_that_is_left() -> None:
    assert blocks(999_999, is_cpu=False) == 999


def test_on_a_cpu_it_takes_what_full_sequences_can_use() -> None:
    assert blocks() == 4 * 7  # 100 tokens are 7 blocks


def test_on_a_cpu_it_takes_less_if_there_is_less() -> None:
    assert blocks(5_999) == 5


@pytest.mark.parametrize("is_cpu", [True, False])
def test_kv_cache_memory_is_taken_at_its_word(is_cpu: bool) -> None:
    assert blocks(10, is_cpu=is_cpu, kv_cache_memory=100_500) == 100


@pytest.mark.parametrize("available", [999, 0, -5])
def test_without_memory_for_a_block_it_does_not_start(available: int) -> None:
    with pytest.raises(StartupError, match=f"{max(0, available)} bytes of the 1000"):
        blocks(available)


def test_a_kv_cache_memory_below_a_block_is_refused() -> None:
    with pytest.raises(StartupError, match="kv_cache_memory is too small: 999 bytes"):
        blocks(kv_cache_memory=999)


def test_graphs_that_leave_nothing_for_the_cache_are_named() -> None:
    config = EngineConfig(model="none")
    with pytest.raises(StartupError, match=r"CUDA graphs leave no memory .* 0.5 GiB. Lower --max"):
        num_cache_blocks(
            config,
            max_model_len=16,
            bytes_per_block=1000,
            available=900,
            is_cpu=False,
            graphs=2**29,
        )


@pytest.mark.parametrize(
    ("options", "more"),
    [({}, "--gpu-memory-utilization"), ({"kv_cache_memory": 6_000}, "--kv-cache-memory")],
    ids=["what is left", "what is given"],
)
def test_a_length_asked_for_that_does_not_fit_is_refused(
    options: dict[str, Any], more: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StartupError) as refused:
        blocks(6_999, max_model_len=100, **options)
    text = str(refused.value)
    assert text.startswith("max_model_len doesn't fit in memory: one sequence of 100 tokens takes")
    assert "room for 96 tokens" in text
    assert text.endswith(f"Use --max-model-len 96, or raise {more}.")
    assert blocks(7_000, max_model_len=100) == 7
    assert not caplog.records
    assert blocks(6_999, **options) == 6  # the checkpoint's own length was nobody's wish
    assert "Requests may have up to 96 tokens: one sequence of 100" in caplog.text


def test_the_log_says_what_takes_the_memory(llava: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    llm = LLM(str(llava), max_model_len=64, max_num_seqs=2, device="cpu", progress=False)
    assert llm.engine.info is not None
    memory, num_blocks = llm.engine.info.memory, llm.engine.info.num_blocks
    runner = llm.engine.runner._runner
    assert memory.kv_cache == sum(c.nbytes for pair in runner.kv_caches for c in pair)
    assert memory.weights == runner.weight_bytes > 4 * llm.engine.info.num_parameters * 0.9
    assert memory.peak == runner.memory.peak  # 0 where the process has held as much before
    assert memory.graphs == memory.outside == 0
    (line,) = [text for text in caplog.messages if text.startswith("Memory: ")]
    said = rf"weights [\d.]+ MiB, peak of a step [\d.]+ [GM]iB, KV cache [\d.]+ MiB \({num_blocks} "
    assert re.fullmatch(rf"Memory: {said}blocks of 16 tokens\)", line)
    assert "graphs" not in caplog.messages[-1]


def test_a_step_that_does_not_fit_is_refused(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def profile(*_: Any) -> None:
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(build.ModelRunner, "profile", profile)
    with pytest.raises(StartupError, match=r"a step doesn't fit .* 2.00 GiB.* Lower --max-num-b"):
        LLM(str(llava), max_model_len=64, device="cpu", progress=False)


def encoder_rows(max_item_rows: int, **options: Any) -> int:
    config = EngineConfig(model="none", max_num_batched_tokens=100, **options)
    return num_encoder_rows(config, max_item_rows, bytes_per_row=2**10)


def test_encoder_cache_holds_what_a_step_and_an_image_need_at_least() -> None:
    assert encoder_rows(10) == 2**17  # 128 MiB
    assert encoder_rows(2**18) == 2**18
    assert encoder_rows(10, encoder_cache_memory=20_000) == 19


def test_encoder_cache_below_an_image_is_refused() -> None:
    assert encoder_rows(9, encoder_cache_memory=9 * 2**10) == 9
    with pytest.raises(StartupError) as error:
        encoder_rows(10, encoder_cache_memory=9 * 2**10)
    assert str(error.value) == (
        "encoder_cache_memory is too small: 9216 bytes. One image takes up to 10 tokens of 1024 "
        "bytes: give at least 10240."
    )


PACED = EngineConfig(model="none", max_decode_slowdown=2.0)


class Timed:
    """A runner whose steps take so many seconds, by their tokens."""

    def __init__(self, seconds: Callable[[int], float]) -> None:
        self.seconds = seconds
        self.sizes: list[int] = []

    def time_steps(self, max_tokens: int) -> Iterator[tuple[int, float]]:
        size = 1
        while size <= max_tokens:
            self.sizes.append(size)
            yield size, self.seconds(size)
            size *= 2


@pytest.mark.parametrize(
    ("seconds", "options", "sizes"),
    [
        (lambda size: 1.0 + size, {}, [1, 2, 4, 8, 16]),  # 17 s are twice the 5 s of 4 and more
        (lambda size: 1.0, {}, [1, 2, 4, 8, 16, 32, 64]),  # nothing is ever too slow
        (lambda size: 1.0, {"max_num_batched_tokens": 20}, [1, 2, 4, 8, 16]),
        (lambda size: size, {"max_num_seqs": 1}, [1, 2, 4]),
    ],
    ids=["rising", "flat", "small budget", "one sequence"],
)
def test_only_steps_that_a_pace_may_allow_are_timed(
    seconds: Callable[[int], float], options: dict[str, int], sizes: list[int]
) -> None:
    config = EngineConfig(model="none", max_decode_slowdown=2.0, **{"max_num_seqs": 4, **options})
    runner = Timed(seconds)
    pace = make_pace(cast(Any, runner), config, max_tokens=100)
    assert runner.sizes == sizes
    assert pace is not None
    assert [pace.seconds(size) for size in sizes] == [seconds(size) for size in sizes]


def test_timing_that_has_taken_long_ends_where_a_decodes_pace_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(build, "MAX_TIMING", 0.0)
    runner = Timed(lambda size: 1.0)
    make_pace(cast(Any, runner), PACED, max_tokens=1000)
    assert runner.sizes[-1] == 32


@pytest.mark.parametrize("error", [PluginError("no."), torch.OutOfMemoryError("no.")])
def test_a_step_that_cannot_be_timed_takes_nothing_from_those_that_were(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def seconds(size: int) -> float:
        if size > most:
            raise error
        return 1.0

    most = 4
    pace = make_pace(cast(Any, Timed(seconds)), PACED, max_tokens=99)
    assert pace is not None and pace.seconds(8) == 2.0
    assert "Steps of more than 4 tokens can't be timed: no." in caplog.text
    most = 0
    assert make_pace(cast(Any, Timed(seconds)), PACED, max_tokens=99) is None
    assert "Prompts hold up answers without a limit." in caplog.text


def test_no_step_is_timed_that_is_longer_than_a_sequence_may_be(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The model has no positions behind its length; no step is too slow for this limit."""
    checkpoint = make_llava(tmp_path)
    llm = LLM(str(checkpoint), max_model_len=40, max_decode_slowdown=1e9, progress=False)
    pace = llm.engine.scheduler.pace
    assert pace is not None
    assert "can't be timed" not in caplog.text
    llm.generate("USER: Hello. ASSISTANT:", SamplingParams(max_tokens=5, ignore_eos=True))
    assert len(pace._factors) == 6, "each step tells it how long it took"


@pytest.mark.parametrize(
    ("device", "options", "overlaps"),
    [
        ("cpu", {}, False),
        ("cpu", {"async_scheduling": True}, True),
        ("cuda", {}, True),
        ("cuda", {"async_scheduling": False}, False),
        ("cuda", {"num_speculative_tokens": 3}, False),
        ("cpu", {"num_speculative_tokens": 3}, False),
    ],
    ids=str,
)
def test_steps_overlap_where_the_device_computes_by_itself(
    device: str, options: dict[str, Any], overlaps: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    assert overlaps_steps(EngineConfig(model="none", **options), device) is overlaps
    drops = device == "cuda" and "num_speculative_tokens" in options
    assert ("prepared one by one: drafts wait" in caplog.text) == drops


def test_without_a_limit_nothing_is_timed() -> None:
    runner = Timed(lambda size: 1.0)
    assert make_pace(cast(Any, runner), EngineConfig(model="none"), max_tokens=99) is None
    assert not runner.sizes


@pytest.mark.parametrize("takes_text", [True, False])
def test_a_prompt_that_takes_long_on_a_cpu_is_tried_without_its_images(
    llava: Path, takes_text: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(build, "MOST_TRIAL_FLOPS", 0.0)
    monkeypatch.setattr(build, "UNTRIED_SHARE", 100.0)  # more than any trial took
    tried, run = [], build.ModelRunner.profile

    def profile(runner: build.ModelRunner, requests: list[Request], **few: int) -> None:
        assert few == ({} if requests[0].items else {"max_num_seqs": 1})
        tried.append([len(request.items) for request in requests])
        if not takes_text and tried == [[0]]:
            raise PluginError("no text without an image.")
        run(runner, requests, **few)

    monkeypatch.setattr(build.ModelRunner, "profile", profile)
    llm = LLM(str(llava), max_model_len=64, max_num_seqs=2, device="cpu", progress=False)
    assert llm.engine.info is not None
    memory = llm.engine.info.memory
    assert tried == ([[0]] if takes_text else [[0], [1]])
    assert (memory.peak >= 100 * memory.weights) == takes_text
    assert any("Images aren't tried" in text for text in caplog.messages) == takes_text


@pytest.mark.parametrize(
    ("device", "came_first", "threads", "told"),
    [
        ("cpu", True, 2, True),
        ("cpu", False, 2, False),
        ("cpu", True, 1, False),
        ("cuda", True, 2, False),
    ],
)
def test_that_torchs_threads_take_the_kernels_cores_is_told(
    device: str,
    came_first: bool,
    threads: int,
    told: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("mm_engine.torch_threads.MAY_SPIN", came_first)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    build.tell_of_spinning(torch.device(device))
    assert ("Import mm_engine first, or set OMP_WAIT_POLICY=passive." in caplog.text) == told


def test_an_engine_tells_of_it(
    llava: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mm_engine.torch_threads.MAY_SPIN", True)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    LLM(str(llava), max_model_len=64, max_num_seqs=2, device="cpu", progress=False)
    assert caplog.text.count("PyTorch was imported before mm_engine") == 1


def test_a_requests_text_is_what_no_item_stands_for() -> None:
    ranges = (PlaceholderRange("image", 0, 1, 2), PlaceholderRange("image", 1, 4, 1))
    items = tuple(Item(place, "", {}) for place in ranges)
    request = Request("r", (7, 0, 0, 8, 0, 9), SamplingParams(), items)
    text = build.text_of(request)
    assert text.prompt_token_ids == (7, 8, 9) and text.items == ()
