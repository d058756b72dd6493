"""How flags with a syntax of their own are read."""

from __future__ import annotations

import pytest

from mm_engine.cli.options import parse_limits, parse_size, parse_speculation
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
        ('{"method": "ngram", "draft": 1}', "key that isn't known: 'draft'. Use method, "),
    ],
)
def test_another_speculative_config_is_refused(text: str, fact: str) -> None:
    with pytest.raises(StartupError, match=fact):
        parse_speculation(text)
