"""A step on the real model: what fails fails alone, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import IMAGE_SIZE, make_llava
from mm_engine.attention.torch_sdpa import TorchAttention
from mm_engine.config import EngineConfig
from mm_engine.errors import PluginError, StartupError
from mm_engine.request import Item
from mm_engine.sequence import SampledToken, ScheduledBatch, ScheduledSequence, Sequence
from mm_engine.worker import model_runner
from mm_engine.worker.loader import open_model
from mm_engine.worker.model_runner import ModelRunner
from sequences import make_item, make_sequence

BLOCK = 4
NUM_BLOCKS = 64
IMAGE, ROWS = 4, 16  # the placeholder's id, and how many an image takes
POISON = 77  # a token whose embedding is NaN in some tests


@pytest.fixture(scope="module")
def runner(tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A float32 model."""
    checkpoint = make_llava(tmp_path_factory.mktemp("model"))
    config = make_config(checkpoint)
    return ModelRunner(open_model(config), config)


def make_config(checkpoint: Path, **options: Any) -> EngineConfig:
    return EngineConfig(
        model=str(checkpoint), device="cpu", block_size=BLOCK, progress=False, **options
    )


@pytest.fixture(autouse=True)
def fresh(runner: ModelRunner) -> None:
    """No block and no feature of another test."""
    runner.init_cache(NUM_BLOCKS)
    runner.encoder.features.clear()


@pytest.fixture
def poisoned(runner: ModelRunner) -> Iterator[None]:
    """Whoever reads token 77 gets NaN."""
    embeddings: Tensor = runner.model.language_model.embedding.weight.data
    before = embeddings[POISON].clone()
    embeddings[POISON] = float("nan")
    yield
    embeddings[POISON] = before


def pixels(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)


def with_image(seed: int, values: Tensor | None = None) -> Sequence:
    """`<s> 9 <image> 20 <seed>` and its picture."""
    item = make_item(
        f"image-{seed}", 2, ROWS, pixel_values=pixels(seed) if values is None else values
    )
    prompt = (1, 9, *[IMAGE] * ROWS, 20, 30 + seed)
    return make_sequence(prompt, items=(item,), temperature=0.0)


def place(sequences: list[Sequence], blocks: Iterator[int]) -> None:
    for sequence in sequences:
        sequence.block_table = [
            next(blocks) for _ in range(-(-(sequence.num_prompt_tokens + 12) // BLOCK))
        ]


def step(
    runner: ModelRunner, shares: Mapping[Sequence, int], evict: tuple[str, ...] = ()
) -> list[SampledToken]:
    """Run one step as the engine would: encode what is new, then append what was sampled."""
    encode: dict[str, Item] = {}
    for sequence in shares:
        for item in sequence.request.items:
            if item.content_key not in runner.encoder.features:
                encode[item.content_key] = item
    scheduled = tuple(ScheduledSequence(s, num) for s, num in shares.items())
    sampled = runner.run(ScheduledBatch(scheduled, tuple(encode.values()), evict)).tokens
    assert len(sampled) == len(scheduled)
    for share, token in zip(scheduled, sampled, strict=True):
        if token.error is None:
            share.sequence.num_computed_tokens += share.num_new_tokens
        if token.token_id is not None:
            share.sequence.token_ids.append(token.token_id)
    return sampled


def answer(runner: ModelRunner, sequences: list[Sequence], num: int = 8) -> list[list[int]]:
    """Greedy answers of sequences that run together, prompts whole in the first step."""
    for _ in range(num):
        step(runner, {s: s.num_uncomputed_tokens for s in sequences})
    return [sequence.output_token_ids for sequence in sequences]


def test_an_image_that_can_not_be_encoded_leaves_the_others_tokens_as_they_are(
    runner: ModelRunner,
) -> None:
    good = [with_image(1), make_sequence((1, 50, 51), temperature=0.0), with_image(2)]
    place(good, iter(range(NUM_BLOCKS)))
    expected = answer(runner, good)
    assert len({tuple(tokens) for tokens in expected}) == 3

    runner.init_cache(NUM_BLOCKS)
    runner.encoder.features.clear()
    bad = with_image(3, torch.full((3, IMAGE_SIZE, IMAGE_SIZE), float("nan")))
    again = [with_image(1), make_sequence((1, 50, 51), temperature=0.0), with_image(2)]
    place([bad, *again], iter(range(NUM_BLOCKS)))
    order = [again[0], bad, *again[1:]]
    sampled = step(runner, {s: s.num_uncomputed_tokens for s in order})
    assert [token.error is not None for token in sampled] == [False, True, False, False]
    error = sampled[1].error
    assert error is not None and error.name == "PluginError"
    assert "mm-llava" in error.message and "embed_images" in error.message
    assert "image-3" not in runner.encoder.features
    answer(runner, again, 7)
    assert [sequence.output_token_ids for sequence in again] == expected


def test_a_step_in_which_nobody_can_run_is_all_errors(runner: ModelRunner) -> None:
    bad = with_image(3, torch.full((3, IMAGE_SIZE, IMAGE_SIZE), float("nan")))
    place([bad], iter(range(NUM_BLOCKS)))
    (token,) = step(runner, {bad: bad.num_uncomputed_tokens})
    assert token.error is not None and token.token_id is None


def test_a_share_that_does_not_touch_the_bad_image_runs(runner: ModelRunner) -> None:
    bad = with_image(3, torch.full((3, IMAGE_SIZE, IMAGE_SIZE), float("nan")))
    place([bad], iter(range(NUM_BLOCKS)))
    assert step(runner, {bad: 2})[0].error is None
    assert step(runner, {bad: 1})[0].error is not None


def test_chunks_through_an_image_bring_the_same_tokens_as_one_step(runner: ModelRunner) -> None:
    whole, chunked = with_image(1), with_image(1)
    place([whole, chunked], iter(range(NUM_BLOCKS)))
    (expected,) = answer(runner, [whole])
    while chunked.num_uncomputed_tokens > 1 or not chunked.num_output_tokens:
        (token,) = step(runner, {chunked: min(3, chunked.num_uncomputed_tokens)})
        assert (token.token_id is None) == (chunked.num_computed_tokens < 20)
    answer(runner, [chunked], 7)
    assert chunked.output_token_ids == expected
    assert runner.encoder.num_encoded >= 1


def test_nan_fails_its_own_sequence_and_its_blocks_are_cleaned(
    runner: ModelRunner, poisoned: None
) -> None:
    neighbour = make_sequence((1, 50, 51, 52, 53), temperature=0.0)
    place([neighbour], iter(range(NUM_BLOCKS)))
    (expected,) = answer(runner, [neighbour])
    runner.init_cache(NUM_BLOCKS)

    sick = make_sequence((1, POISON, 51, 52, 53, 54), temperature=0.0)
    neighbour = make_sequence((1, 50, 51, 52, 53), temperature=0.0)
    place([sick, neighbour], iter(range(NUM_BLOCKS)))
    first, second = step(runner, {sick: 6, neighbour: 5})
    assert first.error is not None and "NaN" in first.error.message
    assert second.error is None
    for keys, values in runner.kv_caches:
        assert keys.isfinite().all() and values.isfinite().all()
        assert not keys[sick.block_table].any() and not values[sick.block_table].any()
        assert keys[neighbour.block_table].any()
    answer(runner, [neighbour], 7)
    assert neighbour.output_token_ids == expected


@pytest.mark.parametrize("num_new", [31, 12], ids=["whole-prompt", "chunk"])
def test_who_gets_the_blocks_of_a_sick_sequence_answers_as_ever(
    num_new: int, runner: ModelRunner, poisoned: None
) -> None:
    """A chunk samples nothing, and its sequence may be aborted before any other does."""
    prompts = [(1, 50, 51), (1, 60, 61, 62, 63, 64, 65)]

    def next_two() -> list[Sequence]:
        sequences = [make_sequence(prompt, temperature=0.0) for prompt in prompts]
        place(sequences, iter(range(NUM_BLOCKS)))
        return sequences

    expected = answer(runner, next_two())
    runner.init_cache(NUM_BLOCKS)
    sick = make_sequence((1, *[POISON] * 30), temperature=0.0)
    place([sick], iter(range(NUM_BLOCKS)))
    (token,) = step(runner, {sick: num_new})
    assert token.error is not None and "NaN" in token.error.message
    assert answer(runner, next_two()) == expected


def test_nan_in_any_row_of_a_share_fails_it(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the row that is sampled doesn't see it, as past a sliding window."""
    forward = runner.model.forward

    def spoiled(*args: Any, **options: Any) -> Tensor:
        hidden: Tensor = forward(*args, **options)
        hidden[1] = float("nan")
        return hidden

    monkeypatch.setattr(runner.model, "forward", spoiled)
    sick, neighbour = (make_sequence((1, 50, 51), temperature=0.0) for _ in range(2))
    place([sick, neighbour], iter(range(NUM_BLOCKS)))
    first, second = step(runner, {sick: 3, neighbour: 3})
    assert first.error is not None and first.token_id is None
    assert second.error is None and second.token_id is not None
    for keys, values in runner.kv_caches:
        assert not keys[sick.block_table].any() and not values[sick.block_table].any()


def test_evicted_features_are_gone_before_new_ones_come(runner: ModelRunner) -> None:
    first, second = with_image(1), with_image(2)
    place([first, second], iter(range(NUM_BLOCKS)))
    step(runner, {first: 20})
    step(runner, {second: 20}, evict=("image-1",))
    assert list(runner.encoder.features) == ["image-2"]


def test_the_cache_takes_as_many_bytes_as_said(runner: ModelRunner) -> None:
    total = sum(cache.nbytes for pair in runner.kv_caches for cache in pair)
    assert total == NUM_BLOCKS * runner.cache_bytes_per_block
    assert [layer.layer_index for layer in runner.layers] == [0, 1]


def test_profiling_leaves_no_cache_and_no_features(runner: ModelRunner) -> None:
    runner.profile([with_image(1).request])
    assert runner.kv_caches == [] and runner.encoder.features == {}
    assert 0 < runner.available_memory() < 2**50


@pytest.mark.parametrize(
    ("num_drafted", "max_tokens", "num_seqs", "length"),
    [(0, 20, 5, 20), (3, 20, 5, 20), (3, 8, 2, 20), (3, 20, 5, 2)],
)
def test_profiling_samples_as_many_rows_as_a_step_may(
    runner: ModelRunner,
    monkeypatch: pytest.MonkeyPatch,
    num_drafted: int,
    max_tokens: int,
    num_seqs: int,
    length: int,
) -> None:
    """Over the whole dummy, or as much of it as so many sequences can have at once."""
    config = make_config(
        runner.opened.ctx.checkpoint,
        max_num_seqs=5,
        max_num_batched_tokens=max_tokens,
        num_speculative_tokens=num_drafted,
    )
    monkeypatch.setattr(runner, "config", config)
    room = -(-length * num_seqs // BLOCK) * runner.cache_bytes_per_block
    monkeypatch.setattr(runner.memory, "available", lambda: room if length < 20 else 2**40)
    steps, run = [], runner.run
    monkeypatch.setattr(runner, "run", lambda batch: steps.append(batch) or run(batch))
    before = runner.sampler.num_unseeded
    runner.profile([with_image(1).request])
    shares = steps[-1].sequences
    num_drafted = min(num_drafted, length - 1)
    assert len(shares) == num_seqs
    assert {(s.num_new_tokens, len(s.draft_token_ids)) for s in shares} == {(1, num_drafted)}
    assert {s.start + s.num_rows for s in shares} == {length}
    assert all(s.samples for s in shares)
    assert runner.sampler.num_unseeded == before, "it takes no request's random numbers"


def test_profiling_finds_an_encoder_that_breaks_its_contract(runner: ModelRunner) -> None:
    item = make_item("short", 2, ROWS - 1, pixel_values=pixels(1))  # the plugin gives 16
    request = make_sequence((1, 9, *[IMAGE] * (ROWS - 1)), items=(item,)).request
    with pytest.raises(PluginError, match=r"embed_images .*expected shape \[15, 64\].*\[16, 64\]"):
        runner.profile([request])


def test_an_attention_backend_that_cannot_serve_is_refused(runner: ModelRunner) -> None:
    checkpoint = runner.opened.ctx.checkpoint
    config = make_config(checkpoint, attention_backend="flash-attn", load_format="dummy")
    with pytest.raises(StartupError, match="can't serve .*: flash-attn needs a CUDA card"):
        ModelRunner(open_model(config), config)


def test_blocks_are_rounded_up_to_what_the_backend_takes(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TorchAttention, "block_multiple", 3)
    config = make_config(
        runner.opened.ctx.checkpoint, attention_backend="torch", load_format="dummy"
    )
    assert ModelRunner(open_model(config), config).block_size == 6


def test_where_steps_are_long_few_are_timed(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_runner, "LONG_STEP", 0.0)
    steps, run = [], runner.run
    monkeypatch.setattr(runner, "run", lambda batch: steps.append(batch.num_tokens) or run(batch))
    assert [size for size, _ in runner.time_steps(100)] == [1, 8, 64]
    assert steps == [1, 1, 8, 64], "the first step of all was a cold one: it runs again"


def test_steps_are_timed_up_to_a_size_and_leave_the_cache_as_it_was(runner: ModelRunner) -> None:
    times = list(runner.time_steps(20))
    assert [size for size, _ in times] == [1, 2, 4, 8, 16]
    assert all(seconds > 0 for _, seconds in times)
    assert all(not cache.any() for caches in runner.kv_caches for cache in caches)
    sequence = with_image(1)
    place([sequence], iter(range(NUM_BLOCKS)))
    before = answer(runner, [sequence])
    runner.init_cache(NUM_BLOCKS)
    runner.encoder.features.clear()
    again = with_image(1)
    place([again], iter(range(NUM_BLOCKS)))
    assert answer(runner, [again]) == before
