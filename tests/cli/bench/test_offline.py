"""`engine bench latency` and `throughput`: the engine without a server."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from mm_engine import LLM
from mm_engine.cli.bench.offline import measure_latency, measure_throughput, workloads
from mm_engine.cli.bench.workload import ImageSize, Shape

PLAIN = Shape(input_len=20, output_len=4)
PICTURES = Shape(input_len=20, output_len=4, num_images=2, image_sizes=(ImageSize(40, 30),))


@pytest.fixture(scope="module")
def llm(llava: Path) -> LLM:
    return LLM(str(llava), kv_cache_memory=2**22, load_format="dummy", progress=False)


def test_latency_is_measured_batch_by_batch_after_the_warm_up(llm: LLM) -> None:
    ticks: list[None] = []
    before = llm.engine.stats()
    run = measure_latency(
        llm,
        PICTURES,
        batch_size=3,
        num_iters=2,
        num_iters_warmup=1,
        tick=lambda: ticks.append(None),
    )
    after = llm.engine.stats()
    assert len(run.seconds) == 2
    assert len(ticks) == 3
    assert (run.prompt_tokens, run.output_tokens) == (20 + 2 * 16, 4)
    # No image was seen twice: each of the 3 batches of 3 prompts was computed.
    assert after.num_encodes - before.num_encodes == 3 * 3 * 2
    assert after.num_generation_tokens - before.num_generation_tokens == 3 * 3 * 4


def test_throughput_counts_every_token_of_every_prompt(llm: LLM) -> None:
    run = measure_throughput(llm, PLAIN, num_prompts=10, num_warmups=1, progress=False)
    assert (run.prompt_tokens, run.output_tokens, run.failures) == (200, 40, [])
    tokens = [count for _, count, _ in run.progress]
    assert tokens == sorted(tokens)
    assert tokens[-1] == 40  # without those of the warm-up


def test_failed_prompts_are_counted_and_not_answered(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**tensors: object) -> None:
        raise ValueError("broken on purpose")

    monkeypatch.setattr(llm.engine.runner._runner.model, "embed_images", fail)
    unseen = dataclasses.replace(PICTURES, seed=1)  # features of others are kept
    run = measure_throughput(llm, unseen, num_prompts=3, num_warmups=0, progress=False)
    assert [name for name, _ in run.failures] == ["PluginError"] * 3
    assert run.output_tokens == 0


def test_what_warms_up_is_not_what_is_measured(llm: LLM) -> None:
    measured, warm_up = workloads(llm, PICTURES)
    assert measured.text_ids(0) != warm_up.text_ids(0)
    assert measured.images(0)[0].tobytes() != warm_up.images(0)[0].tobytes()


def test_latency_prints_a_table_and_writes_a_record(
    bench: Callable[..., Result], llava: Path, tmp_path: Path
) -> None:
    file = tmp_path / "latency.json"
    size = ("--batch-size", 2, "--num-iters", 3, "--num-iters-warmup", 1)
    flags = ("--input-len", 8, "--output-len", 3, "--kv-cache-memory", "4MiB", "--json", file)
    done = bench("latency", "-m", llava, *size, *flags)
    assert done.exit_code == 0, done.output
    record = json.loads(file.read_text())
    figures = record["figures"]
    assert len(figures["iterations_seconds"]) == figures["latency_seconds"]["count"] == 3
    assert (figures["prompt_tokens_each"], figures["output_tokens_each"]) == (8, 3)
    mean = figures["latency_seconds"]["mean"]
    assert figures["output_tokens_per_second"] == pytest.approx(2 * 3 / mean)
    assert record["arguments"]["batch_size"] == 2
    assert "3 batches of 2" in done.stdout
    assert "latency of a batch" in done.stdout


def test_throughput_prints_a_table_and_writes_a_record(
    bench: Callable[..., Result], llava: Path, tmp_path: Path
) -> None:
    file = tmp_path / "throughput.json"
    flags = ("--input-len", 8, "--output-len", 3, "--kv-cache-memory", "4MiB", "--json", file)
    done = bench("throughput", "-m", llava, "--num-prompts", 7, "--image-size", "9x9", *flags)
    assert done.exit_code == 0, done.output
    figures = json.loads(file.read_text())["figures"]
    assert figures["answered"] == 7
    assert (figures["prompt_tokens"], figures["output_tokens"]) == (7 * (8 + 16), 7 * 3)
    assert figures["requests_per_second"] == pytest.approx(7 / figures["seconds"])
    assert figures["output_tokens_per_second"] == pytest.approx(21 / figures["seconds"])
    assert "7 of 7 answered" in done.stdout


def test_caches_are_switched_off_as_in_a_server(
    bench: Callable[..., Result], llava: Path, tmp_path: Path
) -> None:
    file = tmp_path / "throughput.json"
    shared = ("--num-prompts", 4, "--input-len", 8, "--output-len", 2, "--prefix-len", 64)
    flags = ("--max-num-seqs", 1, "--kv-cache-memory", "4MiB", "--json", file)
    found = {}
    for caching in ("--enable-prefix-caching", "--no-enable-prefix-caching"):
        done = bench("throughput", "-m", llava, *shared, *flags, caching)
        assert done.exit_code == 0, done.output
        found[caching] = json.loads(file.read_text())["figures"]["cached_prompt_tokens"]
    assert found == {"--enable-prefix-caching": 3 * 64, "--no-enable-prefix-caching": 0}
