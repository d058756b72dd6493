"""`engine bench serve` against a real server: lengths, figures, failures, keys."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from mm_engine.cli.bench.client import Measured, ask, base_of, open_client
from mm_engine.cli.bench.online import public_address
from odd_models import PACED, plugin_flags
from serving import KEY, ServerProcess
from tokenizing import bytes_only

Load = Callable[..., tuple[Result, Any]]
SHORT = ("--num-prompts", 6, "--output-len", 5, "--max-concurrency", 3)


@pytest.fixture(scope="module")
def paced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server whose model is slower than it is: each token is told by itself."""
    folder = tmp_path_factory.mktemp("paced")
    with ServerProcess(folder, "--dtype", "float32", *plugin_flags(folder, PACED)) as started:
        yield started


@pytest.mark.parametrize("num_tokens", [24, 200])
@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
def test_the_server_counts_the_tokens_asked_for(
    load_from: Callable[[ServerProcess], Load],
    paced: ServerProcess,
    endpoint: str,
    num_tokens: int,
) -> None:
    done, record = load_from(paced)(*SHORT, "--endpoint", endpoint, "--input-len", num_tokens)
    assert done.exit_code == 0, done.output
    assert record["figures"]["failures"] == {}
    for request in record["figures"]["each"]:
        assert request["prompt_tokens"] == pytest.approx(num_tokens, abs=1)
        assert request["output_tokens"] == 5
    total = record["figures"]["prompt_tokens"]
    assert f"{total:,} tokens, {total / 6:,.1f} each" in done.stdout
    assert record["figures"]["itl_seconds"]["count"] == 6 * 4  # each token was seen to come


@pytest.mark.parametrize("endpoint", ["/v1/chat/completions", "/v1/completions"])
def test_a_prefix_comes_on_top(load: Load, endpoint: str) -> None:
    _, record = load(*SHORT, "--endpoint", endpoint, "--input-len", 40, "--prefix-len", 32)
    assert record["figures"]["failures"] == {}
    for request in record["figures"]["each"]:
        assert request["prompt_tokens"] == pytest.approx(72, abs=2)


def test_a_tokenizer_that_is_not_the_models_is_told(load: Load, tmp_path: Path) -> None:
    """One of bytes: the server counts what it wrote as fewer tokens."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    bytes_only().save_pretrained(tmp_path)
    wrong = ("--tokenizer", tmp_path, "--endpoint", "/v1/completions", "--prefix-len", 500)
    done, record = load(*SHORT, *wrong)
    assert record is None
    assert str(done.exception).startswith("the server counts fewer tokens than were sent: ")
    assert "of 508. Give --tokenizer" in str(done.exception)


def test_images_come_on_top_and_are_seen_by_the_model(load: Load, server: ServerProcess) -> None:
    encodes = server.metric("mm_engine_encodes_total", KEY)
    done, record = load(*SHORT, "--input-len", 40, "--image-size", "60x40", "--num-images", 2)
    assert record["figures"]["failures"] == {}
    for request in record["figures"]["each"]:
        # 144 tokens an image, and the line's end that the demo's template writes after it
        assert request["prompt_tokens"] == pytest.approx(40 + 2 * 145, abs=1)
    assert server.metric("mm_engine_encodes_total", KEY) - encodes == 2 * 7  # one to warm up
    assert "2 images of 60×40" in done.stdout


def test_repeated_images_are_found_in_the_encoder_cache(load: Load, server: ServerProcess) -> None:
    encodes = server.metric("mm_engine_encodes_total", KEY)
    flags = ("--num-warmups", 0, "--seed", 5, "--image-size", "60x40", "--image-repeats", 1.0)
    load("--num-prompts", 5, "--output-len", 2, "--max-concurrency", 1, *flags)
    assert server.metric("mm_engine_encodes_total", KEY) - encodes == 1


def test_a_prefix_is_found_in_the_prefix_cache_and_nothing_else_is(load: Load) -> None:
    one_by_one = ("--num-prompts", 5, "--output-len", 2, "--max-concurrency", 1, "--seed", 6)
    _, apart = load(*one_by_one, "--input-len", 100)
    assert apart["figures"]["cached_prompt_tokens"] == 0
    done, alike = load(*one_by_one, "--input-len", 40, "--prefix-len", 64)
    # The first computes it; of the template's and the prefix' tokens whole blocks are kept.
    assert 4 * 48 <= alike["figures"]["cached_prompt_tokens"] <= 4 * 80
    assert f"{alike['figures']['cached_prompt_tokens']} from a cache" in done.stdout
    assert done.stderr == ""


def test_a_server_that_has_seen_the_prompts_is_remarked_on(load: Load) -> None:
    twice = ("--num-prompts", 3, "--output-len", 2, "--max-concurrency", 1, "--seed", 7)
    first, _ = load(*twice)
    again, _ = load(*twice)
    assert first.stderr == ""
    assert "of the prompts' tokens came from a cache" in again.stderr
    assert "Give another --seed" in again.stderr


def test_failed_requests_are_counted_by_status_and_shown(load: Load) -> None:
    """Twenty at once, where the queue has eight places."""
    done, record = load("--num-prompts", 20, "--output-len", 40)
    figures = record["figures"]
    assert done.exit_code == 0
    assert figures["requests"] == 20 == len(figures["each"])
    assert figures["failed"] == figures["failures"]["429"]["count"] > 0
    # Eight, or seven while the warm-up's request still has its place.
    assert figures["answered"] == 20 - figures["failed"] >= 7
    assert figures["e2e_latency_seconds"]["count"] == figures["answered"]
    assert sum(request["failure"] == "429" for request in figures["each"]) == figures["failed"]
    assert f"failed {figures['failed']} × 429: " in done.stdout
    assert f"{figures['answered']} of 20 answered" in done.stdout


def test_without_any_answer_the_command_fails_and_still_says_why(
    load: Load, server: ServerProcess
) -> None:
    """No warm-up, which would find out; the trial is short enough for the model."""
    done, record = load("--num-prompts", 2, "--num-warmups", 0, "--output-len", 4090)
    assert record["figures"]["answered"] == 0
    assert record["figures"]["failures"]["400"]["count"] == 2
    assert record["figures"]["ttft_seconds"] is None
    assert "failed 2 × 400: max_tokens is too large" in done.stdout
    assert str(done.exception).startswith("no request was answered: 2 failed")


def test_a_workload_that_the_server_refuses_is_told_before_the_load(load: Load) -> None:
    done, record = load("--input-len", 5000)
    assert record is None
    assert "400: the prompt is too long" in str(done.exception)


def test_the_wrong_key_is_told_and_no_key_is_recorded(
    load: Load, bench: Callable[..., Result], server: ServerProcess
) -> None:
    done = bench("serve", "--base-url", server.url, MM_ENGINE_API_KEY="wrong")
    assert str(done.exception).startswith(f"the server wants a key: {server.url}")
    _, record = load("--num-prompts", 1, "--output-len", 1)
    assert KEY not in json.dumps(record)
    assert "api_key" not in record["arguments"]


def test_a_record_says_what_was_measured_with_what(load: Load, server: ServerProcess) -> None:
    _, record = load("--num-prompts", 2, "--output-len", 2, "--request-rate", 50, "--seed", 3)
    assert record["command"] == "engine bench serve"
    assert record["arguments"]["base_url"] == server.url
    assert record["arguments"]["model"] == "llava-demo"
    assert record["arguments"]["request_rate"] == 50
    assert record["arguments"]["seed"] == 3
    assert {"torch", "mm-engine", "mm-llava"} <= record["versions"].keys()
    assert record["machine"]
    assert record["date"]


def test_percentiles_and_metrics_are_those_asked_for(load: Load) -> None:
    flags = ("--percentile-metrics", "ttft,e2el", "--metric-percentiles", "75,99.9")
    done, record = load(*SHORT, *flags)
    assert {"p75", "p99.9"} <= record["figures"]["itl_seconds"].keys()
    assert "p75" in done.stdout and "p99.9" in done.stdout and "p50" not in done.stdout
    assert "time to first token" in done.stdout and "inter-token" not in done.stdout


def send(url: str, body: dict[str, Any]) -> Measured:
    async def once() -> Measured:
        async with open_client(url, KEY) as client:
            return await ask(client, "/v1/completions", json.dumps(body).encode())

    return asyncio.run(once())


def test_times_follow_each_other(server: ServerProcess) -> None:
    usage = {"stream": True, "stream_options": {"include_usage": True}}
    body = {"prompt": "What is it?", "max_tokens": 6, "ignore_eos": True, "temperature": 0}
    measured = send(server.url, {**body, **usage})
    assert measured.failure is None
    assert measured.output_tokens == 6
    assert measured.ttft is not None and measured.tpot is not None
    assert 0 < measured.ttft <= measured.ttft + 5 * measured.tpot <= measured.e2e
    assert sum(measured.itls) == pytest.approx(5 * measured.tpot)


def test_a_server_that_is_not_there_is_a_failure() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        measured = send(f"http://127.0.0.1:{free.getsockname()[1]}", {})
    assert measured.failure is not None
    assert measured.failure.kind == "ConnectError"


CUT_OFF = b'data: {"choices": [{"text": "one"}]}\n\n'
ERROR = b'data: {"error": {"message": "the engine has stopped"}}\n\n'


@pytest.mark.parametrize(
    ("events", "message"), [(CUT_OFF, "cut off"), (CUT_OFF + ERROR, "the engine has stopped")]
)
def test_a_stream_without_its_end_is_a_failure(events: bytes, message: str) -> None:
    """From a socket: a server that is sound doesn't do it on demand."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            connection, _ = listener.accept()
            with connection:
                asked = b""
                while not asked.endswith(b"{}"):  # closing on what is unread would be a reset
                    asked += connection.recv(65536)
                head = b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
                connection.sendall(head + events)

        thread = threading.Thread(target=answer)
        thread.start()
        measured = send(f"http://127.0.0.1:{listener.getsockname()[1]}", {})
        thread.join()
    assert measured.failure is not None
    assert measured.failure.kind == "stream"
    assert message in measured.failure.message


def test_addresses_are_taken_with_and_without_v1_and_told_without_passwords() -> None:
    assert base_of("http://a:1/v1/") == base_of("http://a:1") == "http://a:1"
    assert public_address("http://me:secret@a:1/v1") == "http://a:1"
