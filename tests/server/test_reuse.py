"""Reuse over HTTP: what `usage`, `/metrics` and the log tell of it, and whom it keeps apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from mm_engine.cli.main import app
from mm_engine.engine.status import EngineStats
from mm_engine.inputs.processed_items import ProcessedItems
from mm_engine.server import log, run
from mm_engine.server.service import bound_salt
from mm_engine.server.settings import ServerSettings
from mm_engine.server.status_line import StatusLine
from pictures import data_url, encode, quarters
from serving import KEY, ServerProcess, wait_until

CACHES = ("prefix_cache", "encoder_cache", "mm_cache")


def ask(server: ServerProcess, question: str, **fields: Any) -> dict[str, Any]:
    picture = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(90, 70)))}}
    content = [picture, {"type": "text", "text": question}]
    body = {"max_tokens": 4, "temperature": 0, "ignore_eos": True, **fields}
    reply = server.http.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": content}], **body}
    )
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def cached(answer: dict[str, Any]) -> int:
    number: int = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
    return number


def counts(server: ServerProcess) -> dict[str, tuple[float, float]]:
    return {
        name: (
            server.metric(f"mm_engine_{name}_queries_total"),
            server.metric(f"mm_engine_{name}_hits_total"),
        )
        for name in CACHES
    }


def grown(
    before: dict[str, tuple[float, float]], after: dict[str, tuple[float, float]]
) -> dict[str, tuple[float, float]]:
    return {
        name: (after[name][0] - before[name][0], after[name][1] - before[name][1])
        for name in CACHES
    }


def test_usage_and_metrics_tell_what_was_found(server: ServerProcess) -> None:
    salt = {"cache_salt": "usage and metrics"}
    before = counts(server)
    first = ask(server, "What colour is the circle?", **salt)
    new = grown(before, between := counts(server))
    num_prompt = first["usage"]["prompt_tokens"]
    assert cached(first) == 0
    assert new == {"prefix_cache": (num_prompt, 0), "encoder_cache": (1, 0), "mm_cache": (1, 0)}
    encodes = server.metric("mm_engine_encodes_total")

    second = ask(server, "Where is it?", **salt)
    new = grown(between, counts(server))
    assert cached(second) >= 64  # its image, and what stands before it
    assert new["prefix_cache"] == (second["usage"]["prompt_tokens"], cached(second))
    assert new["mm_cache"] == (1, 1)
    assert server.metric("mm_engine_encodes_total") == encodes
    for name in CACHES:
        queries, hits = counts(server)[name]
        assert server.metric(f"mm_engine_{name}_hit_rate") == pytest.approx(hits / max(queries, 1))


def test_streams_tell_it_too(server: ServerProcess) -> None:
    salt = {"cache_salt": "streams"}
    question = "What is to be seen here?"
    ask(server, question, **salt)
    content = [
        {"type": "image_url", "image_url": {"url": data_url(encode(quarters(90, 70)))}},
        {"type": "text", "text": question},
    ]
    body = {
        "messages": [{"role": "user", "content": content}],
        "max_tokens": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
        **salt,
    }
    text = server.http.post("/v1/chat/completions", json=body).text
    assert '"cached_tokens":0}' not in text
    assert '"cached_tokens":' in text


def test_salts_are_kept_apart_and_answers_are_the_same(server: ServerProcess) -> None:
    answers = [
        ask(server, "Describe the image.", cache_salt=salt) for salt in ("tenant a", "tenant b")
    ]
    assert [cached(answer) for answer in answers] == [0, 0]
    assert cached(ask(server, "Describe the image.", cache_salt="tenant a")) > 0
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1


@pytest.mark.parametrize("salt", ["", "x" * 1025, 7, ["a"]])
@pytest.mark.parametrize(
    ("route", "prompt"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
        ("/v1/completions", {"prompt": "a"}),
    ],
)
def test_bad_salt_is_refused_by_name(
    server: ServerProcess, route: str, prompt: dict[str, Any], salt: Any
) -> None:
    reply = server.http.post(route, json={**prompt, "cache_salt": salt})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == "cache_salt"


def test_salt_of_any_script_is_taken(server: ServerProcess) -> None:
    reply = server.http.post(
        "/v1/completions", json={"prompt": "a", "max_tokens": 1, "cache_salt": "соль \0 🧂"}
    )
    assert reply.status_code == 200


def test_salt_is_bound_to_the_key() -> None:
    assert bound_salt(None, "mine") == "mine"
    salts = [bound_salt(key, asked) for key in (b"one", b"two") for asked in ("", "mine")]
    assert len({"", "mine", *salts}) == 6
    assert bound_salt(b"one", "mine") == salts[1]
    assert not any("one" in salt or "mine" in salt for salt in salts)


def test_with_a_key_caches_still_serve(strict: ServerProcess) -> None:
    question = "What is seen with a key?"
    assert cached(ask(strict, question)) == 0
    assert cached(ask(strict, question)) > 0
    assert KEY not in strict.output


@pytest.mark.parametrize("told", [True, False])
def test_load_is_told_again_and_again_unless_switched_off(tmp_path: Path, told: bool) -> None:
    parts = ("running 0, waiting 0", "hits: prefix ", "tokens/s", "KV cache 0%")
    settings = {"status_interval": 0.05, "log_stats": told}
    with ServerProcess(tmp_path, settings=settings) as server:

        def line_after_an_answer() -> bool:
            ask(server, "What is it?")
            lines = server.output.splitlines()
            return any(all(part in line for part in parts) for line in lines)

        if told:
            wait_until(line_after_an_answer, "a line on the load")
        else:
            assert not any(line_after_an_answer() for _ in range(100))
            assert "running" not in server.output


@pytest.mark.parametrize("flags", [(), ("--disable-log-stats",)])
def test_the_flag_switches_the_lines_off(
    monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    asked: list[ServerSettings] = []

    def run_server(config: object, settings: ServerSettings, ready: object) -> int:
        asked.append(settings)
        return 0

    monkeypatch.setattr(run, "serve", run_server)
    monkeypatch.setattr(log, "configure_logging", lambda *_: None)
    done = CliRunner().invoke(app, ["serve", *flags])
    assert done.exit_code == 0, done.output
    assert [settings.log_stats for settings in asked] == [not flags]


def stats(**values: int) -> EngineStats:
    names = EngineStats.__dataclass_fields__
    return EngineStats(**{**dict.fromkeys(names, 0), "num_blocks": 200, **values})


def test_line_tells_what_is_new_since_the_last() -> None:
    processed = ProcessedItems(1)
    line = StatusLine(processed)
    assert line.update(stats(num_steps=50, num_prompt_tokens=1000), 100.0) is None  # the first
    processed.num_queries, processed.num_hits = 4, 1
    now = stats(
        num_steps=60,
        num_running=3,
        num_waiting=2,
        num_prompt_tokens=1500,
        num_generation_tokens=20,
        num_used_blocks=50,
        num_prefix_queries=500,
        num_prefix_hits=400,
        num_preemptions=2,
    )
    assert line.update(now, 105.0) == (
        "running 3, waiting 2 · prompt 100, answers 4 tokens/s · KV cache 25% · "
        "hits: prefix 80%, images 25% · preempted 2"
    )
    # Nothing computed since, but somebody waits still.
    assert line.update(now, 110.0) == (
        "running 3, waiting 2 · prompt 0, answers 0 tokens/s · KV cache 25%"
    )


def test_line_tells_how_many_guesses_were_right() -> None:
    line = StatusLine(ProcessedItems(1))
    line.update(stats(num_steps=1, num_draft_tokens=100, num_accepted_tokens=90), 100.0)
    now = stats(num_steps=2, num_draft_tokens=200, num_accepted_tokens=115)
    assert (line.update(now, 105.0) or "").endswith("KV cache 0% · drafts accepted 25%")


def test_idle_server_says_nothing() -> None:
    line = StatusLine(ProcessedItems(1))
    assert [line.update(stats(num_steps=7), now) for now in (1.0, 2.0, 2.0)] == [None] * 3
    assert line.update(stats(num_steps=8), 3.0) is not None
