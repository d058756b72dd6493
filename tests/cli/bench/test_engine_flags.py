"""Each command measures the engine as users have it, unless flags say otherwise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result

import mm_engine
from mm_engine.cli.bench import server, startup


class Asked(Exception):
    """What an engine or a server was asked for, instead of starting it."""


@pytest.fixture(autouse=True)
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def own_server(model: str, options: dict[str, Any], *, max_queued_requests: int) -> None:
        raise Asked("server", options)

    def llm(model: str, **options: Any) -> None:
        raise Asked("LLM", options)

    monkeypatch.setattr(server, "OwnServer", own_server)
    monkeypatch.setattr(startup, "OwnServer", own_server)
    monkeypatch.setattr(mm_engine, "LLM", llm)


@pytest.mark.parametrize(
    ("command", "what", "slowdown"),
    [
        ("serve", "server", 1.75),
        ("startup", "server", 1.75),
        ("latency", "LLM", math.inf),
        ("throughput", "LLM", math.inf),
    ],
)
def test_a_command_measures_what_users_have(
    bench: Callable[..., Result], command: str, what: str, slowdown: float
) -> None:
    asked = bench(command, "-m", "m").exception
    assert isinstance(asked, Asked)
    assert asked.args[0] == what
    assert asked.args[1]["max_decode_slowdown"] == slowdown


@pytest.mark.parametrize("command", ["serve", "startup", "latency", "throughput"])
@pytest.mark.parametrize("value", ["2.5", "inf"])
def test_a_flag_is_measured_as_it_is_given(
    bench: Callable[..., Result], command: str, value: str
) -> None:
    asked = bench(command, "-m", "m", "--max-decode-slowdown", value).exception
    assert isinstance(asked, Asked)
    assert asked.args[1]["max_decode_slowdown"] == float(value)


@pytest.mark.parametrize("value", ["1.75", "inf"])
def test_no_pace_can_be_given_to_a_server_that_runs(
    bench: Callable[..., Result], value: str
) -> None:
    done = bench("serve", "--base-url", "http://127.0.0.1:9", "--max-decode-slowdown", value)
    assert done.exit_code == 2
    assert "--max-decode-slowdown has no effect on a running server" in done.stderr
