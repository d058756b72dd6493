"""benchmarks/open.py on real servers, small: it measures, and sees what is wrong."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
#: Keeps four megabytes for each request with a picture.
LEAKING_PLUGIN = """
from mm_engine.plugins import expand_placeholders, hookimpl, placeholder_token_id
from mm_llava.counts import num_image_tokens
from mm_llava.plugin import max_tokens, model_class

kept = []


@hookimpl
def input_processor(ctx, inputs):
    kept.append(b"x" * 2**22)
    count = num_image_tokens(ctx.hf_config)
    counts = [count] * len(inputs.multi_modal_data["image"])
    return expand_placeholders(inputs, placeholder_token_id(ctx), counts)
"""


@pytest.fixture
def part(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """A script or a part of one as a module; they import each other by their bare names."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    parts = [f"open_parts.{path.stem}" for path in (BENCHMARKS / "open_parts").glob("*.py")]
    for name in ("open", "record", "open_parts", *parts):  # none of another test's, and none left
        monkeypatch.setitem(sys.modules, name, None)
        del sys.modules[name]
    return importlib.import_module


@pytest.fixture
def record(
    part: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Any]:
    """Run open.py; its exit status and the record that it wrote."""

    def run(*flags: str) -> tuple[int, Any]:
        out = tmp_path / "out.json"
        question, *rest = flags
        monkeypatch.setattr(sys, "argv", ["open", question, "--json", str(out), *rest])
        status = part("open").main()
        return status, json.loads(out.read_text("utf-8"))

    return run


SMALL_SOAK = ("soak", "--requests", "160", "--every", "40", "--max-growth", "600")


def test_a_short_soak_is_flat(record: Callable[..., Any]) -> None:
    status, told = record(*SMALL_SOAK)
    assert told["complaints"] == [] and told["wrong_references"] == []
    assert {name for name, one in told["criteria"].items() if not one["kept"]} == set()
    assert status == 0 and told["flat"]
    assert told["num_references"] == 4 * 6 and told["num_tracebacks"] == 0
    assert [checkpoint["num_requests"] for checkpoint in told["checkpoints"]] == [40, 80, 120, 160]
    assert told["checkpoints"][-1]["processes"].keys() == {"front", "engine", "grammars"}
    kinds = told["requests"]
    assert sum(n for kind in kinds for n in kinds[kind].values()) == 160 + 24
    bad = [statuses for kind, statuses in kinds.items() if kind.startswith("bad: ")]
    assert bad and all(status in ("400", "404", "405", "413") for one in bad for status in one)
    assert any("left" in statuses for statuses in kinds.values())


def test_a_server_that_keeps_something_of_each_request_is_found_out(
    record: Callable[..., Any], tmp_path: Path
) -> None:
    plugin = tmp_path / "leaks.py"
    plugin.write_text(LEAKING_PLUGIN)
    status, told = record(*SMALL_SOAK, "--server-flags", "--plugin", str(plugin))
    broken = {name for name, one in told["criteria"].items() if not one["kept"]}
    assert status == 1 and broken == {"memory"}
    assert told["criteria"]["memory"]["found"]["front"] > 600


def test_every_kind_of_traffic_comes_and_follows_from_its_seed(part: Callable[[str], Any]) -> None:
    traffic = part("open_parts.traffic")
    first, second, other = (traffic.Traffic(seed) for seed in (1, 1, 2))
    asked = [first.asked(number) for number in range(6000)]
    assert asked[:100] == [second.asked(number) for number in range(100)]
    assert asked[:100] != [other.asked(number) for number in range(100)]
    bad = {one.kind.removeprefix("bad: ") for one in asked if one.bad}
    assert bad == traffic.BAD.keys()
    assert len({one.kind for one in asked if not one.bad}) == len(traffic.GOOD) + 1  # and back
    assert 0.03 < sum(one.bad for one in asked) / len(asked) < 0.07
    assert 0.03 < sum(bool(one.leaves) for one in asked) / len(asked) < 0.07
    assert {one.leaves for one in asked} == {
        *("", "in its body", "after a time", "after some events")
    }
    assert 0.3 < sum(one.stream for one in asked) / len(asked) < 0.7


def flat_run(soak: Any, server: Any) -> Any:
    gauges = dict.fromkeys((*server.HELD_FOR_REQUESTS, *server.KEPT), 0.0)
    gauges |= dict.fromkeys(server.KEPT.values(), 10.0)
    held = {"front": server.Held(2**28, 20, 9), "engine": server.Held(2**29, 10, 4)}
    snapshot = server.Snapshot(held, gauges)
    points = [soak.Checkpoint(500 * n, n, snapshot, 0.1) for n in range(1, 9)]
    return soak.Run(checkpoints=points, num_references=6)


@pytest.mark.parametrize(
    ("broken", "change"),
    [
        (None, lambda n: {}),
        ("memory", lambda n: {"rss": 2**29 + 2**20 * n}),  # 1 MiB in 500 requests
        ("num_fds", lambda n: {"num_fds": 10 + (n == 8)}),
        ("num_threads", lambda n: {"num_threads": 4 + (n == 8)}),
    ],
)
def test_growth_of_one_process_is_seen(
    part: Callable[[str], Any], broken: str | None, change: Callable[[int], dict[str, int]]
) -> None:
    soak, server = part("open_parts.soak"), part("open_parts.server")
    run = flat_run(soak, server)
    for n, point in enumerate(run.checkpoints, 1):
        held = point.snapshot.processes
        engine = replace(held["engine"], **change(n))
        snapshot = server.Snapshot(held | {"engine": engine}, point.snapshot.gauges)
        run.checkpoints[n - 1] = replace(point, snapshot=snapshot)
    judged = soak.verdict(run, max_growth=1.0)
    assert [name for name, one in judged.items() if not one["kept"]] == [broken] * bool(broken)


@pytest.mark.parametrize(
    ("broken", "gauge", "value"),
    [("held", "num_used_blocks", 1.0), ("kept", "encoder_rows", 11.0)],
)
def test_what_is_left_behind_is_seen(
    part: Callable[[str], Any], broken: str, gauge: str, value: float
) -> None:
    soak, server = part("open_parts.soak"), part("open_parts.server")
    run = flat_run(soak, server)
    last = run.checkpoints[-1].snapshot
    snapshot = server.Snapshot(last.processes, last.gauges | {gauge: value})
    run.checkpoints[-1] = replace(run.checkpoints[-1], snapshot=snapshot)
    judged = soak.verdict(run, max_growth=1.0)
    assert [name for name, one in judged.items() if not one["kept"]] == [broken]


@pytest.mark.parametrize(
    ("broken", "field"), [("references", "wrong_references"), ("answers", "complaints")]
)
def test_wrong_answers_are_seen(part: Callable[[str], Any], broken: str, field: str) -> None:
    soak = part("open_parts.soak")
    run = flat_run(soak, part("open_parts.server"))
    getattr(run, field).append("caption")
    judged = soak.verdict(run, max_growth=1.0)
    assert [name for name, one in judged.items() if not one["kept"]] == [broken]
