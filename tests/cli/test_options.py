"""How flags with a syntax of their own are read."""

from __future__ import annotations

import pytest

from mm_engine.cli.options import parse_limits, parse_size
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
