"""Steps of decodes by graphs: which steps, what is padded, what happens when none can be captured.

Tokens are held to transformers' in tests/test_parity_graphs.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from graphing import CallAgain, Replays, replaying
from mm_engine.attention.triton_paged import triton_fault
from mm_engine.errors import StartupError
from mm_engine.sequence import SampledToken, ScheduledBatch, ScheduledSequence, Sequence
from mm_engine.worker import graphs
from mm_engine.worker.capture import GraphCapture
from mm_engine.worker.graphs import CpuRecorder, CudaRecorder, ladder
from mm_engine.worker.model_runner import ModelRunner
from poisoned import NUM_BLOCKS, POISON, make_poisoned
from sequences import make_sequence

MAX_NUM_SEQS = 6  # graphs of 1, 2, 4 and 6

pytestmark = pytest.mark.skipif(
    triton_fault("cpu") is not None, reason="needs Triton and its interpreter"
)


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A float32 model whose token 77 is NaN."""
    return make_poisoned(
        tmp_path_factory.mktemp("model"),
        "llama",
        attention_backend="triton",
        max_num_seqs=MAX_NUM_SEQS,
        max_model_len=48,
    )


@pytest.fixture(autouse=True)
def fresh(runner: ModelRunner) -> Iterator[Replays]:
    """An empty cache, and no graph of another test."""
    runner.memory.graphs = 0
    runner.init_cache(NUM_BLOCKS)
    with replaying() as replays:
        yield replays


def capture(runner: ModelRunner) -> None:
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    assert runner.graphs is not None


def make(num: int, prompt: tuple[int, ...] = (1, 9, 20)) -> list[Sequence]:
    blocks = iter(range(NUM_BLOCKS))
    sequences = [make_sequence((*prompt, 60 + i), temperature=0.0) for i in range(num)]
    for sequence in sequences:
        sequence.block_table = [next(blocks) for _ in range(4)]
    return sequences


def step(runner: ModelRunner, sequences: list[Sequence]) -> list[SampledToken]:
    shares = tuple(ScheduledSequence(s, s.num_uncomputed_tokens) for s in sequences)
    tokens = runner.run(ScheduledBatch(shares)).tokens
    for sequence, token in zip(sequences, tokens, strict=True):
        if token.token_id is not None:
            sequence.num_computed_tokens = sequence.num_tokens
            sequence.token_ids.append(token.token_id)
    return tokens


@pytest.mark.parametrize(
    ("most", "sizes"),
    [
        (1, [1]),
        (3, [1, 2, 3]),
        (8, [1, 2, 4, 8]),
        (30, [1, 2, 4, 8, 16, 24, 30]),
        (64, [1, 2, 4, *range(8, 65, 8)]),
        (1000, [1, 2, 4, *range(8, 256, 8), *range(256, 513, 16)]),
    ],
)
def test_the_ladder_ends_at_the_most_sequences(most: int, sizes: list[int]) -> None:
    assert ladder(CudaRecorder, most) == sizes


def test_on_a_cpu_small_steps_have_graphs_of_their_own_size() -> None:
    assert ladder(CpuRecorder, 11) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 11]
    assert ladder(CpuRecorder, 500)[-3:] == [24, 28, 32]


def test_steps_of_decodes_are_replayed_with_the_next_larger_graph(
    runner: ModelRunner, fresh: Replays
) -> None:
    plain = make(6)
    for num in (6, 6, 3, 5, 1):
        step(runner, plain[:num])
    assert not fresh.steps
    runner.init_cache(NUM_BLOCKS)
    capture(runner)
    sequences = make(6)
    for num in (6, 6, 3, 5, 1):  # the first is the prompts'
        step(runner, sequences[:num])
    assert fresh.steps == [(6, 6), (4, 3), (6, 5), (1, 1)]
    assert [s.token_ids for s in sequences] == [s.token_ids for s in plain]
    assert len({tuple(s.output_token_ids[:3]) for s in sequences}) > 1


def test_other_steps_are_not_replayed(runner: ModelRunner, fresh: Replays) -> None:
    capture(runner)
    sequences = make(7)
    step(runner, sequences)  # prompts
    step(runner, sequences)  # more than the ladder's top
    late, *others = sequences
    late.num_computed_tokens -= 1
    step(runner, [late, *others[:2]])  # a chunk of a prompt among decodes
    others[0].block_table += range(28, 28 + 9)  # longer than a sequence can be
    step(runner, others[:2])
    assert not fresh.steps


@pytest.mark.filterwarnings("ignore:invalid value")  # the interpreter's, of NaN
def test_padding_writes_nothing_and_nobodys_nan_stays_in_it(
    runner: ModelRunner, fresh: Replays
) -> None:
    capture(runner)
    sequences = make(5)
    step(runner, sequences)
    sick = sequences[3]
    sick.token_ids[-1] = POISON
    for caches in runner.kv_caches:
        for cache in caches:
            cache[20:] = 7.0  # nobody's blocks
    tokens = step(runner, sequences)
    assert fresh.steps == [(6, 5)]
    assert [token.error is not None for token in tokens] == [False] * 3 + [True, False]
    error = tokens[3].error
    assert error is not None and "NaN" in error.message
    for caches in runner.kv_caches:
        for cache in caches:
            assert cache.isfinite().all()
            assert (cache[20:] == 7.0).all(), "no row of padding may be written anywhere"
            written = cache.flatten(0, 1)[sick.block_table[1] * 4]
            assert not written.any(), "what the sick one wrote is cleaned"
    seen: list[Tensor] = []
    forward = runner.model.forward

    def watched(*args: Any, inputs_embeds: Tensor) -> Tensor:
        seen.append(inputs_embeds.clone())
        out: Tensor = forward(*args, inputs_embeds=inputs_embeds)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner.model, "forward", watched)
        step(runner, sequences[:3])
        assert len(seen[-1]) == 4 and seen[-1].isfinite().all()


def test_a_cache_made_anew_has_no_graphs(runner: ModelRunner) -> None:
    """They hold the addresses of the one before."""
    capture(runner)
    runner.init_cache(NUM_BLOCKS)
    assert runner.graphs is None


def test_two_are_tried_out_over_a_small_cache_and_the_rest_is_estimated(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = iter([1000, 700, 660])
    monkeypatch.setattr(runner.memory, "free", lambda: next(free))
    sizes, capture_graph = [], runner.capture_graph

    def watched(size: int, dtype: torch.dtype) -> None:
        sizes.append(size)
        assert len(runner.kv_caches[0][0]) == 1
        capture_graph(size, dtype)

    monkeypatch.setattr(runner, "capture_graph", watched)
    GraphCapture(runner, enforce_eager=False, progress=False).try_out()
    assert sizes == [6, 4]
    assert runner.memory.graphs == 300 + 3 * 40
    assert runner.graphs is None and runner.kv_caches == []


def test_the_log_says_time_and_memory(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    free = iter(range(10 * 2**30, 0, -(2**29)))
    monkeypatch.setattr(runner.memory, "free", lambda: next(free))
    capture(runner)
    assert runner.memory.graphs == 2**31
    (record,) = caplog.records
    said = r"CUDA graphs: 4, for steps of 1 to 6 decodes; \d+\.\d s, 2\.0 GiB\."
    assert re.fullmatch(said, record.getMessage())


@contextmanager
def raising(error: Exception, size: int) -> Iterator[None]:
    """A recorder that fails at `size`, once more at its end, as a capture that is broken off."""

    class Fails(CallAgain):
        def __call__(self, function: Callable[[], None]) -> Callable[[], None]:
            if size == sizes.pop(0):
                try:
                    raise error
                finally:
                    raise RuntimeError("CUDA error: the capture was invalidated")
            return super().__call__(function)

    sizes = [6, 4, 2, 1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(graphs.RECORDERS, "cpu", Fails)
        yield


@pytest.mark.parametrize("size", [6, 2])
def test_a_model_that_can_not_be_captured_runs_eagerly_with_one_warning(
    runner: ModelRunner, size: int, caplog: pytest.LogCaptureFixture, fresh: Replays
) -> None:
    with raising(ValueError("it waits."), size):
        capturing = GraphCapture(runner, enforce_eager=False, progress=False)
        capturing.try_out()
        runner.init_cache(NUM_BLOCKS)
        if size == 2:  # not among the two that are tried out
            assert not caplog.records
        capturing.capture()
    (record,) = caplog.records
    assert record.getMessage() == (
        "CUDA graphs can't be captured: ValueError: it waits. Decodes run without them, as with "
        "--enforce-eager."
    )
    assert runner.graphs is None
    sequences = make(3)
    for _ in range(2):
        assert all(token.error is None for token in step(runner, sequences))
    assert not fresh.steps


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no."), RuntimeError("CUDA error: out of memory")],
    ids=lambda error: type(error).__name__,
)
def test_graphs_that_do_not_fit_are_refused_with_what_helps(
    runner: ModelRunner, error: Exception
) -> None:
    with raising(error, 4), pytest.raises(StartupError) as refused:
        capture(runner)
    text = str(refused.value)
    assert text.startswith("CUDA graphs don't fit in memory: the one for 4 sequences (")
    assert "Lower --max-num-seqs or --gpu-memory-utilization" in text
    assert text.endswith("--enforce-eager.")


@pytest.mark.parametrize(
    ("eager", "captures", "why"),
    [(True, True, "--enforce-eager"), (False, False, "attention by triton can't be captured")],
)
def test_the_log_says_why_there_are_none(
    runner: ModelRunner,
    eager: bool,
    captures: bool,
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setattr(runner.backend, "captures", captures)
    capturing = GraphCapture(runner, enforce_eager=eager, progress=False)
    capturing.try_out()
    capturing.capture()
    assert runner.graphs is None and len(runner.kv_caches[0][0]) == NUM_BLOCKS
    assert [record.getMessage() for record in caplog.records] == [f"No CUDA graphs: {why}."]


def test_where_nothing_captures_nobody_expects_any(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.delitem(graphs.RECORDERS, "cpu")
    capturing = GraphCapture(runner, enforce_eager=False, progress=False)
    capturing.try_out()
    capturing.capture()
    assert runner.graphs is None and not caplog.records


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA card")
def test_on_a_card_replays_give_what_eager_steps_give(tmp_path: Path) -> None:
    runner = make_poisoned(
        tmp_path, "llama", device="cuda", attention_backend="triton", max_num_seqs=MAX_NUM_SEQS
    )
    runs = []
    for graphed in (False, True):
        runner.init_cache(NUM_BLOCKS)
        if graphed:
            capture(runner)
            assert runner.memory.graphs > 0
        sequences = make(6)
        for num in (6, 6, 3, 5, 1):
            step(runner, sequences[:num])
        runs.append([s.token_ids for s in sequences])
    assert runs[0] == runs[1]


def test_other_ranks_capture_the_same_or_none(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A rank that can't, while this one can, ends graphs in all."""
    told: list[Any] = []

    class OtherRanks:
        def send(self, message: Any) -> None:
            told.append(message)

        def wait(self, kind: type) -> list[Any]:
            size = told[-1].size
            return [kind(1, "ValueError: it waits" if size == 4 else "")]

    monkeypatch.setattr(runner, "ranks", OtherRanks())
    monkeypatch.setattr(runner, "group", SimpleNamespace(num_calls=9))
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    assert runner.graphs is None
    assert [type(message).__name__ for message in told] == ["Capture", "Capture", "DropGraphs"]
    assert [message.size for message in told[:2]] == [6, 4] and told[0].dtype == "float32"
    assert told[2].num_calls == 9
    assert "can't be captured: ValueError: it waits, in rank 1. Decodes run" in caplog.text
