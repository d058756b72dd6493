"""benchmarks/open.py on real servers, small: it measures, and sees what is wrong."""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

pytestmark = pytest.mark.long

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
#: Takes longer for a picture than a client that has left may leave anything behind.
SLOW_PLUGIN = """
import time
from mm_engine.plugins import hookimpl
from mm_llava.model import LlavaForConditionalGeneration
from mm_llava.plugin import max_tokens


class Slow(LlavaForConditionalGeneration):
    def embed_images(self, *, pixel_values):
        time.sleep(1.2)
        return super().embed_images(pixel_values=pixel_values)


@hookimpl
def model_class(ctx):
    return Slow
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
    gauges = dict.fromkeys((*server.HELD_FOR_REQUESTS, *server.KEPT, server.TASKS), 0.0)
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
        ("num_threads", lambda n: {"num_threads": 4 + n}),
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
    [("held", "num_used_blocks", 1.0), ("kept", "encoder_rows", 11.0), ("tasks", "num_tasks", 1.0)],
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


def test_a_small_overload_is_answered_and_refused(record: Callable[..., Any]) -> None:
    flags = ("--seconds", "2", "--closed-seconds", "1", "--concurrency", "4", "--output-len", "64")
    _, told = record("overload", *flags, "--server-flags", "--max-num-seqs", "4")
    assert told["runs"].keys() == {"default", "long", "long, by time"}
    for run in told["runs"].values():
        base, loaded = run["closed_loop"], run["open_loop"]
        assert run["criteria"]["answered"]["kept"], run["criteria"]["answered"]["found"]
        assert base["num_admitted"] > 4
        assert loaded["num_admitted"] + sum(loaded["failures"].values()) == loaded["num_requests"]
        assert loaded["num_requests"] > base["num_requests"] * 10 > 0
        assert 0 < base["ttft_seconds"]["median"] <= base["ttft_seconds"]["p99"]
        assert base["output_tokens_per_second"] == pytest.approx(64 * base["admitted_per_second"])
        assert loaded["num_health"] > 20 and loaded["health_wrong"] == {}
        assert run["rss_bytes"][0].keys() == {"front", "engine"}
    assert told["runs"]["default"]["open_loop"]["failures"].keys() == {"429"}
    assert told["runs"]["default"]["closed_loop"]["failures"] == {}
    assert "--max-queue-seconds" in told["runs"]["long, by time"]["flags"]


def overloaded() -> dict[str, Any]:
    loop = {"failures": {}, "num_hanging": 0, "ttft_seconds": {"p99": 1.0}, "health_wrong": {}}
    health = {"health_seconds": {"p99": 0.1}}
    return {
        "closed_loop": {**loop, **health},
        "open_loop": {**loop, **health, "failures": {"429": 5, "503": 1}},
        "rss_bytes": [{"front": 2**28}, {"front": 2**28}],
    }


@pytest.mark.parametrize(
    ("broken", "change"),
    [
        (None, {}),
        ("answered", {"failures": {"429": 5, "ConnectionResetError": 1}}),
        ("answered", {"failures": {"no Retry-After": 1}}),
        ("answered", {"num_hanging": 1}),
        ("latency", {"ttft_seconds": {"p99": 2.1}}),
        ("health", {"health_seconds": {"p99": 0.3}}),
        ("health", {"health_wrong": {"503": 1}}),
    ],
)
def test_what_an_overload_must_not_bring_is_seen(
    part: Callable[[str], Any], broken: str | None, change: dict[str, Any]
) -> None:
    verdict, figures = part("open_parts.overload").verdict, overloaded()
    figures["open_loop"] |= change
    judged = verdict(figures)
    assert [name for name, one in judged.items() if not one["kept"]] == [broken] * bool(broken)


def test_growth_under_overload_is_seen(part: Callable[[str], Any]) -> None:
    figures = overloaded()
    figures["rss_bytes"][1]["front"] += 2**26
    judged = part("open_parts.overload").verdict(figures)
    assert [name for name, one in judged.items() if not one["kept"]] == ["memory"]


@pytest.mark.parametrize(
    ("head", "rest", "kind"),
    [
        ("429 Too Many\nretry-after: 2", "{}", "429"),
        ("429 Too Many\ncontent-length: 2", "{}", "no Retry-After"),
        ("500 Oh", "{}", "500"),
        ("", "", "no answer"),
        ("200 OK", "data: {}\n\n", "stream"),
        ("200 OK", 'data: {"error":{}}\n\ndata: [DONE]\n\n', "stream"),
        ("200 OK", 'data: {"completion_tokens":7}\n\ndata: [DONE]\n\n', None),
    ],
)
def test_the_light_client_says_what_came(
    part: Callable[[str], Any], head: str, rest: str, kind: str | None
) -> None:
    answer = head and f"HTTP/1.1 {head}\n\n".replace("\n", "\r\n") + rest

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(answer.encode())
        writer.close()

    async def ask() -> Any:
        server = await asyncio.start_server(respond, "127.0.0.1", 0)
        async with server:
            url = httpx.URL(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
            return await part("open_parts.light").ask_lightly(url, "/x", b"{}")

    measured = asyncio.run(ask())
    assert (measured.failure and measured.failure.kind) == kind
    if kind is None:
        assert measured.output_tokens == 7 and measured.begin < measured.first_event < measured.end


def test_a_load_looks_for_garbage_among_new_objects_alone(part: Callable[[str], Any]) -> None:
    with part("open_parts.light").unpaused():
        assert len(gc.get_objects()) < 5000
    assert len(gc.get_objects()) > 5000, "the positive control: all is looked through again"


def test_http_beside_the_engine_alone(record: Callable[..., Any]) -> None:
    flags = ("--streams", "4", "--prompts", "8", "--rounds", "2", "--output-len", "16")
    status, told = record("http-cost", *flags)
    for name in ("offline", "http"):
        assert len(told[name]) == 2
        for one in told[name]:
            assert one["output_tokens"] == 8 * 16 and one["seconds"] > 0
    assert told["http"][0]["cores_taken"].keys() == {"front", "engine", "load generator"}
    rates = told["output_tokens_per_second"]
    pairs = [http / alone for http, alone in zip(rates["http"], rates["offline"], strict=True)]
    assert told["ratios"] == pytest.approx(pairs)
    assert told["ratio"] == pytest.approx(sum(pairs) / 2)
    assert told["kept"] == (told["ratio"] >= 0.85) == (status == 0)


def test_a_killed_engine_is_told_and_replaced(record: Callable[..., Any]) -> None:
    status, told = record("kill9", "--rounds", "1", "--streams", "4")
    (one,) = told["rounds"]
    assert one["num_told"] == one["num_streams"] == 4 and one["same_answer"]
    assert one["told"] == ["the engine has stopped: killed by SIGKILL. Start it again."]
    assert 0 < max(one["told_seconds"]) < 20
    assert one["left_at_end"] == [] and one["exit_status"] == 0
    assert one["ready_again_seconds"] <= one["serving_again_seconds"]
    assert told["kept"] == (status == 0)


def test_a_server_that_starts_no_other_engine_is_found_out(record: Callable[..., Any]) -> None:
    flags = ("--rounds", "1", "--streams", "2", "--server-flags", "--max-engine-restarts", "0")
    with pytest.raises(RuntimeError, match="ended"):
        record("kill9", *flags)


@pytest.mark.parametrize(
    "change",
    [
        {"num_told": 3},
        {"num_cut_off": 1},
        {"told_seconds": [0.1, 2.1]},
        {"serving_again_seconds": 5.1},
        {"num_left_behind": 1},
        {"left_at_end": ["process 1"]},
        {"exit_status": 1},
        {"num_tracebacks": 1},
        {"same_answer": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_a_kill_must_not_bring_is_seen(
    part: Callable[[str], Any], change: dict[str, Any]
) -> None:
    kill9 = part("open_parts.kill9")
    good = {
        "num_streams": 4,
        "num_told": 4,
        "num_cut_off": 0,
        "told_seconds": [0.1, 0.2],
        "cold_start_seconds": 3.0,
        "serving_again_seconds": 4.9,
        "num_left_behind": 0,
        "left_at_end": [],
        "exit_status": 0,
        "num_tracebacks": 0,
        "same_answer": True,
    }
    assert kill9.is_kept(good)
    assert not kill9.is_kept(good | change)


def test_leaving_is_timed_in_each_phase_and_a_slow_step_is_found_out(
    record: Callable[..., Any], tmp_path: Path
) -> None:
    plugin = tmp_path / "slow.py"
    plugin.write_text(SLOW_PLUGIN)
    status, told = record("leave", "--rounds", "1", "--server-flags", "--plugin", str(plugin))
    broken = {name for name, one in told["criteria"].items() if not one["kept"]}
    assert status == 1 and "encoding" in broken
    phases = told["phases"]
    assert [*phases] == ["queued", "fetching", "encoding", "prefilling", "streaming", "waiting"]
    assert phases["encoding"]["seconds"]["max"] > 1
    assert all(phase["num_rounds"] == 1 for phase in phases.values())


@pytest.mark.parametrize("broken", [None, "queued", "waiting", "log"])
def test_what_leaving_must_not_bring_is_seen(
    part: Callable[[str], Any], broken: str | None
) -> None:
    leave = part("open_parts.leave")
    seconds = {name: {"max": 1.1 if name == broken else 0.9} for name in leave.PHASES}
    phases = {name: {"seconds": one} for name, one in seconds.items()}
    judged = leave.verdict({"phases": phases, "num_tracebacks": int(broken == "log")})
    assert [name for name, one in judged.items() if not one["kept"]] == [broken] * bool(broken)
