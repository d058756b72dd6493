"""How flags with a syntax of their own are read."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Callable
from typing import Any

import pytest
from typer.testing import CliRunner

from mm_engine.cli import generate, serve
from mm_engine.cli.bench.engine_flags import EngineFlags
from mm_engine.cli.chat.command import chat
from mm_engine.cli.main import app
from mm_engine.cli.options import engine_options, parse_limits, parse_size, parse_speculation
from mm_engine.config import EngineConfig
from mm_engine.errors import StartupError


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("1000000", 10**6),
        ("512MiB", 512 * 2**20),
        ("2GiB", 2 * 2**30),
        ("2gb", 2 * 10**9),
        ("1.5 GiB", 3 * 2**29),
        ("64k", 64_000),
    ],
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text, "--kv-cache-memory") == size


@pytest.mark.parametrize("text", ["", "0", "-1", "big", "1XiB", "MiB", "1e9", "nan", "0.1"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match="--kv-cache-memory is no size"):
        parse_size(text, "--kv-cache-memory")


@pytest.mark.parametrize(
    ("text", "limits"),
    [
        (None, {}),
        ("image=4", {"image": 4}),
        ("image=0", {"image": 0}),
        ("image=4, audio=1", {"image": 4, "audio": 1}),
        ('{"image": 4}', {"image": 4}),
    ],
)
def test_limits_are_read(text: str | None, limits: dict[str, int]) -> None:
    assert parse_limits(text) == limits


@pytest.mark.parametrize(
    "text",
    ["image", "image=", "=4", "image=x", "image=-1", "4", "{", '{"image": "x"}', "image=1=2"],
)
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(StartupError, match="--limit-mm-per-prompt"):
        parse_limits(text)


@pytest.mark.parametrize("text", [None, "", "  "])
def test_no_speculation_is_the_default(text: str | None) -> None:
    assert parse_speculation(text) == {}
    assert EngineConfig(model="m").num_speculative_tokens == 0


@pytest.mark.parametrize(
    ("keys", "fields"),
    [
        ("", {"num_speculative_tokens": 5}),
        (
            ', "prompt_lookup_max": 7, "prompt_lookup_min": 3',
            {"num_speculative_tokens": 5, "prompt_lookup_max": 7, "prompt_lookup_min": 3},
        ),
        (
            ', "prompt_lookup_max": 1',
            {"num_speculative_tokens": 5, "prompt_lookup_max": 1, "prompt_lookup_min": 1},
        ),
        (
            ', "prompt_lookup_min": 6',
            {"num_speculative_tokens": 5, "prompt_lookup_max": 6, "prompt_lookup_min": 6},
        ),
    ],
)
def test_vllms_speculative_config_is_read(keys: str, fields: dict[str, int]) -> None:
    text = '{"method": "ngram", "num_speculative_tokens": 5' + keys + "}"
    assert parse_speculation(text) == fields
    config = EngineConfig(model="m", **parse_speculation(text))
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("ngram", "can't be read: 'ngram'. Write "),
        ("{", "can't be read: '{'. Write "),
        ("[1]", r"can't be read: \[1\]. Write "),
        ("{}", "method isn't known: None. Use 'ngram'"),
        ('{"method": "eagle", "num_speculative_tokens": 3}', "method isn't known: 'eagle'. Use"),
        ('{"method": ["ngram"]}', r"method isn't known: \['ngram'\]. Use"),
        ('{"method": "ngram"}', "has no num_speculative_tokens. Say"),
        *(
            (
                f'{{"method": "ngram", "num_speculative_tokens": {number}}}',
                rf"num_speculative_tokens is out of range: {number.title()}. Give a positive",
            )
            for number in ("0", "-1", "2.5", "true")
        ),
        ('{"method": "ngram", "draft": 1}', "key that isn't known: 'draft'. Use method, "),
    ],
)
def test_another_speculative_config_is_refused(text: str, fact: str) -> None:
    with pytest.raises(StartupError, match=fact):
        parse_speculation(text)


def test_flags_become_fields() -> None:
    fields = engine_options(
        max_num_seqs=3,
        kv_cache_memory="2MiB",
        encoder_cache_memory=None,
        mm_processor_cache_memory="0",
        speculative_config='{"method": "ngram", "num_speculative_tokens": 5}',
        plugin=["a.py"],
    )
    assert fields == {
        "max_num_seqs": 3,
        "kv_cache_memory": 2 * 2**20,
        "encoder_cache_memory": None,
        "mm_processor_cache_memory": 0,
        "num_speculative_tokens": 5,
        "plugins": ("a.py",),
    }
    EngineConfig(model="m", **fields)


@pytest.mark.parametrize("flag", ["--kv-cache-memory", "--encoder-cache-memory"])
@pytest.mark.parametrize("text", ["0", "", "x"])
def test_a_size_that_is_none_is_told_with_its_flag(flag: str, text: str) -> None:
    with pytest.raises(StartupError, match=f"^{flag} is no size: {text}. Write"):
        engine_options(**{flag[2:].replace("-", "_"): text})


def defaults(command: Callable[..., Any]) -> dict[str, Any]:
    return {name: flag.default for name, flag in inspect.signature(command).parameters.items()}


def test_no_command_has_defaults_of_its_own() -> None:
    """What `engine bench` measures and the others ask is what `engine serve` serves."""
    served = defaults(serve.serve)
    measured = {field.name: field.default for field in dataclasses.fields(EngineFlags)}
    assert measured.pop("max_decode_slowdown") is None  # depends on the command
    del measured["model"]
    assert len(measured) > 10
    assert {name: served[name] for name in measured} == measured
    for command in (generate.generate, chat):
        asked = defaults(command)
        shared = asked.keys() & measured.keys()
        assert len(shared) > 10
        assert {name: asked[name] for name in shared} == {name: served[name] for name in shared}

    config, fields = EngineConfig(model="m"), engine_options(**measured)
    assert {name: getattr(config, name) for name in fields} == fields


@pytest.mark.parametrize("command", ["serve", "bench serve", "bench latency"])
@pytest.mark.parametrize("value", ["1", "1.0", "0.5", "-2", "nan"])
def test_a_slowdown_that_is_none_is_refused_with_the_flags_name(command: str, value: str) -> None:
    words = [*command.split(), "--max-decode-slowdown", value]
    done = CliRunner().invoke(app, words, env={"COLUMNS": "200"})
    assert done.exit_code == 2
    assert "Invalid value for '--max-decode-slowdown'" in done.stderr
    assert f"{float(value):g} isn't above 1." in done.stderr


@pytest.mark.parametrize("command", ["serve", "bench serve", "bench startup"])
def test_help_of_the_slowdown_promises_what_is_taken(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "300"}).stdout
    help_ = re.search(r"--max-decode-slowdown(.*?)--kv-cache-memory", shown, re.DOTALL)
    assert help_ is not None
    words = " ".join(re.sub("[│┃|]", " ", help_[1]).split())
    assert "Must be above 1." in words
    assert "x>=" not in words  # 1 itself won't do
