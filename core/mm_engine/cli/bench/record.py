"""The record of a run: everything that was measured, and what it takes to believe it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_engine.cli.bench.machine import provenance
from mm_engine.cli.bench.startup import PARTS, Startup
from mm_engine.cli.bench.summary import METRICS, Summary, summarize
from mm_engine.errors import StartupError

if TYPE_CHECKING:
    from mm_engine.cli.bench.offline import LatencyRun, ThroughputRun
    from mm_engine.cli.bench.online import LoadRun


def make_record(
    command: str, arguments: Mapping[str, Any], figures: Mapping[str, Any]
) -> dict[str, Any]:
    """A record of `engine bench <command>`, ready for JSON."""
    return {
        "command": f"engine bench {command}",
        **provenance(),
        "arguments": dict(arguments),
        "figures": dict(figures),
    }


def arguments_of(*groups: Any, **others: Any) -> dict[str, Any]:
    """All flags by name, from their groups and others; a key is none of a record's business."""
    arguments: dict[str, Any] = {}
    for group in groups:
        arguments.update(dataclasses.asdict(group))
    arguments.update(others)
    arguments.pop("api_key", None)
    return {
        name: "inf" if value == math.inf else value  # JSON has no infinity
        for name, value in arguments.items()
    }


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a record as JSON.

    Raises:
        StartupError: the file can't be written.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False, default=str)
    try:
        path.write_text(f"{text}\n", "utf-8")
    except OSError as error:
        raise StartupError(
            f"--json can't be written: {path} ({error.strerror}). Name another file."
        ) from None


def latency_figures(run: LatencyRun, batch_size: int, percentiles: Sequence[float]) -> Any:
    """Figures of `engine bench latency`."""
    latency = summarize(run.seconds, percentiles)
    assert latency is not None
    return {
        "latency_seconds": latency.to_json(),
        "output_tokens_per_second": batch_size * run.output_tokens / latency.mean,
        "prompt_tokens_each": run.prompt_tokens,
        "output_tokens_each": run.output_tokens,
        "iterations_seconds": run.seconds,
    }


def throughput_figures(run: ThroughputRun) -> dict[str, Any]:
    """Figures of `engine bench throughput`."""
    num_answered = run.num_prompts - len(run.failures)
    return {
        "seconds": run.seconds,
        "requests": run.num_prompts,
        "answered": num_answered,
        "failed": len(run.failures),
        "failures": count_failures(run.failures),
        "prompt_tokens": run.prompt_tokens,
        "cached_prompt_tokens": run.cached_tokens,
        "output_tokens": run.output_tokens,
        "requests_per_second": num_answered / run.seconds,
        "output_tokens_per_second": run.output_tokens / run.seconds,
        "total_tokens_per_second": (run.prompt_tokens + run.output_tokens) / run.seconds,
    }


def load_summaries(run: LoadRun, percentiles: Sequence[float]) -> dict[str, Summary | None]:
    """The figures of each metric over the answered requests, in seconds, by its flag's name."""
    answered = run.answered
    values = {
        "ttft": [request.ttft for request in answered if request.ttft is not None],
        "tpot": [request.tpot for request in answered if request.tpot is not None],
        "itl": [itl for request in answered for itl in request.itls],
        "e2el": [request.e2e for request in answered],
    }
    return {name: summarize(values[name], percentiles) for name in METRICS}


def count_failures(failures: Iterable[tuple[str, str]]) -> dict[str, dict[str, Any]]:
    """How many requests failed by kind, and what the first of each was told."""
    counted: dict[str, dict[str, Any]] = {}
    for kind, message in failures:
        counted.setdefault(kind, {"count": 0, "first_message": message})["count"] += 1
    return dict(sorted(counted.items()))


def load_figures(run: LoadRun, percentiles: Sequence[float]) -> dict[str, Any]:
    """Figures of `engine bench serve`, and those of each request."""
    answered = run.answered
    prompt_tokens = sum(request.prompt_tokens or 0 for request in answered)
    output_tokens = sum(request.output_tokens for request in answered)
    summaries = load_summaries(run, percentiles)
    return {
        "seconds": run.seconds,
        "requests": len(run.requests),
        "answered": len(answered),
        "failed": len(run.requests) - len(answered),
        "failures": count_failures(
            (request.failure.kind, request.failure.message)
            for request in run.requests
            if request.failure is not None
        ),
        "prompt_tokens": prompt_tokens,
        "cached_prompt_tokens": sum(request.cached_tokens for request in answered),
        "output_tokens": output_tokens,
        "requests_per_second": len(answered) / run.seconds,
        "output_tokens_per_second": output_tokens / run.seconds,
        "total_tokens_per_second": (prompt_tokens + output_tokens) / run.seconds,
        "max_in_flight": max(count for _, count in run.in_flight()),
        **{
            f"{METRICS[name]}_seconds": summary.to_json() if summary else None
            for name, summary in summaries.items()
        },
        "each": [
            {
                "begin": round(request.begin - run.begin, 6),
                "e2e_latency": round(request.e2e, 6),
                "ttft": None if request.ttft is None else round(request.ttft, 6),
                "tpot": None if request.tpot is None else round(request.tpot, 6),
                "prompt_tokens": request.prompt_tokens,
                "output_tokens": request.output_tokens,
                "failure": None if request.failure is None else request.failure.kind,
            }
            for request in run.requests
        ],
    }


def startup_figures(starts: Sequence[Startup]) -> dict[str, Any]:
    """Figures of `engine bench startup`: means, and those of each start."""
    names = (*PARTS, "ready")
    return {
        "mean_seconds": {
            name: sum(getattr(start, name) for start in starts) / len(starts) for name in names
        },
        "starts_seconds": [dataclasses.asdict(start) for start in starts],
    }
