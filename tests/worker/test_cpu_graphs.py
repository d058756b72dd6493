"""Steps of decodes that C++ makes alone: the same numbers as Python's, and when there are none.

The recorder's own tests are in tests/cpu_kernels; parity tests run with these graphs throughout.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from mm_engine_kernels import ops

from checkpoints import make_llava
from mm_engine.config import EngineConfig
from mm_engine.models.checkpoint import read_weights
from mm_engine.models.layers import pack_linears
from mm_engine.models.packed_weights import PackedEmbedding
from mm_engine.sequence import ScheduledBatch, ScheduledSequence, Sequence
from mm_engine.worker.capture import GraphCapture
from mm_engine.worker.graphs import DecodeGraphs
from mm_engine.worker.loader import open_model
from mm_engine.worker.model_runner import ModelRunner
from sequences import make_sequence

NUM_BLOCKS = 64

pytestmark = pytest.mark.skipif(
    ops.chosen("cpu").name != "cpp", reason="needs the C++ kernels: they aren't built here"
)


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of the graphs that ran."""
    seen: list[int] = []
    run = DecodeGraphs.run

    def watched(self: DecodeGraphs, size: int, *rest: Any) -> torch.Tensor:
        seen.append(size)
        return run(self, size, *rest)

    monkeypatch.setattr(DecodeGraphs, "run", watched)
    return seen


def make_runner(path: Path, **options: Any) -> ModelRunner:
    config = EngineConfig(
        model=str(path), device="cpu", block_size=4, progress=False, max_model_len=64, **options
    )
    runner = ModelRunner(open_model(config), config)
    runner.init_cache(NUM_BLOCKS)
    return runner


def generate(runner: ModelRunner, counts: list[int]) -> tuple[list[list[int]], list[torch.Tensor]]:
    """The tokens of seven sequences, of which as many run in each step; and their logits."""
    sequences = [
        make_sequence((1, 9, 20 + i, *range(30, 30 + i)), temperature=0.0) for i in range(7)
    ]
    for i, sequence in enumerate(sequences):
        sequence.block_table = list(range(8 * i, 8 * i + 8))
    logits: list[torch.Tensor] = []
    compute = runner.model.compute_logits
    runner.model.compute_logits = lambda hidden: logits.append(compute(hidden)) or logits[-1]
    try:
        for num in counts:
            step(runner, sequences[:num])
    finally:
        del runner.model.compute_logits
    return [sequence.token_ids for sequence in sequences], logits


def step(runner: ModelRunner, sequences: list[Sequence]) -> None:
    shares = tuple(ScheduledSequence(s, s.num_uncomputed_tokens) for s in sequences)
    for sequence, token in zip(sequences, runner.run(ScheduledBatch(shares)).tokens, strict=True):
        assert token.error is None and token.token_id is not None
        sequence.num_computed_tokens = sequence.num_tokens
        sequence.token_ids.append(token.token_id)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("backbone", "quantization", "changes"),
    [
        ("llama", None, {}),
        ("llama", "int8", {}),
        ("qwen2", None, {}),
        ("qwen2", "int4", {}),
        ("mistral", None, {"sliding_window": 3}),
        ("llama", None, {"head_dim": 20}),
        ("llama", None, {"tie_word_embeddings": True}),
    ],
)
def test_replays_give_the_numbers_of_eager_steps(
    tmp_path: Path,
    sizes: list[int],
    dtype: str,
    backbone: str,
    quantization: str | None,
    changes: dict[str, Any],
) -> None:
    path = make_llava(tmp_path, backbone=backbone, text_changes=changes)
    runner = make_runner(path, dtype=dtype, quantization=quantization, max_num_seqs=7)
    decoder = runner.model.language_model
    assert isinstance(decoder.embedding, PackedEmbedding) == (decoder.lm_head is None)
    counts = [7, 7, 3, 5, 1, 6, 2, 4, 7, 7]  # the first is the prompts'
    expected, logits = generate(runner, counts)
    assert not sizes
    runner.init_cache(NUM_BLOCKS)
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    got, again = generate(runner, counts)
    assert sizes == counts[1:]
    assert got == expected
    assert len({tuple(tokens[-4:]) for tokens in got}) > 1
    for a, b in zip(logits, again, strict=True):
        assert torch.equal(a, b)


def test_between_the_sizes_steps_are_padded(tmp_path: Path, sizes: list[int]) -> None:
    runner = make_runner(make_llava(tmp_path), max_num_seqs=7)
    expected, _ = generate(runner, [7, 7, 5])
    runner.init_cache(NUM_BLOCKS)
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    assert runner.graphs is not None
    runner.graphs.sizes = [6, 7]
    got, _ = generate(runner, [7, 7, 5])
    assert sizes == [7, 6]
    assert got == expected


def test_a_model_that_computes_with_pytorch_runs_without(
    tmp_path: Path, sizes: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    runner = make_runner(make_llava(tmp_path, text_changes={"hidden_act": "gelu"}), max_num_seqs=7)
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    assert runner.graphs is None
    (record,) = (r for r in caplog.records if "graphs" in r.getMessage())
    assert record.levelname == "INFO"
    said = record.getMessage()
    assert said.startswith("Decode graphs can't be captured: NotRecorded: aten.")
    assert said.endswith("Decodes run without them, as with --enforce-eager.")
    generate(runner, [7, 7])
    assert not sizes


def test_each_is_made_when_a_step_first_takes_it(tmp_path: Path, sizes: list[int]) -> None:
    runner = make_runner(make_llava(tmp_path), max_num_seqs=7)
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    graphs: Any = runner.graphs
    assert list(graphs._replays) == [7]
    generate(runner, [7, 7, 3, 3, 5])
    assert list(graphs._replays) == [7, 3, 5]
    assert sizes == [7, 3, 3, 5]


def test_one_that_can_not_be_made_leaves_its_steps_to_the_next(
    tmp_path: Path,
    sizes: list[int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    runner = make_runner(make_llava(tmp_path), max_num_seqs=7)
    expected, _ = generate(runner, [7, 7, 3, 3, 5])
    runner.init_cache(NUM_BLOCKS)
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    forward = DecodeGraphs._forward

    def fails(self: DecodeGraphs, size: int) -> None:
        forward(self, size)
        if size in (3, 4):
            torch.zeros(1).item()

    monkeypatch.setattr(DecodeGraphs, "_forward", fails)
    got, _ = generate(runner, [7, 7, 3, 3, 5])
    assert got == expected
    assert sizes == [7, 5, 5, 5]
    told = [text for text in caplog.messages if text.startswith("No decode graphs of")]
    assert [text.partition(": NotRecorded: ")[0] for text in told] == [
        "No decode graphs of 3 decodes",
        "No decode graphs of 4 decodes",
    ]


def test_they_are_small_and_quickly_made(tmp_path: Path) -> None:
    runner = make_runner(make_llava(tmp_path), max_num_seqs=64)
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    assert runner.graphs is not None
    assert runner.graphs.sizes[-1] == 32
    record: Any = runner.graphs._record
    hidden = runner.hidden_size * 32 * 4  # bytes of a step's hidden states in float32
    assert record._record.num_bytes < 40 * hidden  # of one layer, however many there are


def test_weights_that_are_loaded_anew_are_read(tmp_path: Path, sizes: list[int]) -> None:
    first, second = make_llava(tmp_path / "a"), make_llava(tmp_path / "b", seed=1)
    expected, _ = generate(make_runner(second, max_num_seqs=7), [7, 7, 5])
    runner = make_runner(first, max_num_seqs=7)
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    before, _ = generate(runner, [7, 7, 5])
    model = runner.model
    model.load_weights(read_weights(second, progress=False))
    pack_linears(model)
    runner.clean(torch.arange(NUM_BLOCKS * 4))
    got, _ = generate(runner, [7, 7, 5])
    assert sizes == [7, 5, 7, 5]
    assert got == expected != before


def test_the_time_of_one_token_is_not_that_of_a_replay(tmp_path: Path, sizes: list[int]) -> None:
    runner = make_runner(make_llava(tmp_path), max_num_seqs=7)
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    assert [num for num, _ in runner.time_steps(4)] == [1, 2, 4]
    assert not sizes
    generate(runner, [7, 7])
    assert sizes == [7]


@pytest.mark.usefixtures("reference_kernels")
def test_without_the_kernels_there_are_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    runner = make_runner(make_llava(tmp_path), max_num_seqs=7)
    GraphCapture(runner, enforce_eager=False, progress=False).capture()
    assert runner.graphs is None
    assert "No decode graphs: only the C++ kernels can be recorded." in caplog.messages
