"""Figures of many values, held against numpy and the standard library."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_engine.cli.bench.client import Failure, Measured
from mm_engine.cli.bench.online import LoadRun
from mm_engine.cli.bench.record import load_figures
from mm_engine.cli.bench.report import cache_remark
from mm_engine.cli.bench.summary import summarize
from mm_engine.cli.bench.workload import Shape

seconds = st.floats(min_value=1e-6, max_value=1e4)


@given(st.lists(seconds, min_size=1, max_size=200))
def test_figures_are_numpys(values: list[float]) -> None:
    summary = summarize(values, (0, 25, 50, 99, 99.9, 100))
    assert summary is not None
    assert summary.count == len(values)
    assert summary.mean == pytest.approx(statistics.fmean(values))
    assert summary.std == pytest.approx(np.std(values))
    assert (summary.min, summary.max) == (min(values), max(values))
    for percentile, value in summary.percentiles.items():
        assert value == pytest.approx(np.percentile(values, percentile))
    assert summary.percentiles[50] == pytest.approx(statistics.median(values))
    assert summary.to_json()["p99.9"] == summary.percentiles[99.9]


def test_of_nothing_there_are_no_figures() -> None:
    assert summarize([], (50,)) is None


def request(index: int, begin: float, texts: list[float], end: float, tokens: int) -> Measured:
    measured = Measured(index, begin, end, texts[0] if texts else None, texts, 10)
    measured.output_tokens = tokens
    return measured


def test_the_metrics_of_a_load_are_what_their_names_say() -> None:
    """Four tokens that come at 1, 2, 4 and 7 seconds of a request sent at 0.5."""
    first = request(0, 0.5, [1.0, 2.0, 4.0, 7.0], 7.25, 4)
    failed = Measured(1, 0.5, 9.0, failure=Failure("429", "full"))
    run = LoadRun("demo", 0.0, 10.0, [first, failed])
    figures = load_figures(run, (50,))
    assert figures["ttft_seconds"]["mean"] == 0.5
    assert figures["tpot_seconds"]["mean"] == 2.0  # 6 seconds for 3 tokens after the first
    assert (figures["itl_seconds"]["count"], figures["itl_seconds"]["max"]) == (3, 3.0)
    assert figures["e2e_latency_seconds"]["mean"] == 6.75
    assert figures["e2e_latency_seconds"]["count"] == 1  # what failed is no latency
    assert (figures["answered"], figures["failed"]) == (1, 1)
    assert figures["failures"] == {"429": {"count": 1, "first_message": "full"}}
    assert figures["output_tokens_per_second"] == 0.4
    assert figures["total_tokens_per_second"] == 1.4
    assert figures["max_in_flight"] == 2


def test_requests_in_flight_are_counted_from_begin_to_end() -> None:
    requests = [request(i, b, [], e, 0) for i, (b, e) in enumerate([(0, 4), (1, 2), (2, 3)])]
    flight = LoadRun("demo", 0.0, 4.0, requests).in_flight()
    # One that begins as another ends doesn't overlap with it.
    assert flight == [(0.0, 0), (0, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 0)]


def test_an_answer_without_text_has_a_first_token_all_the_same() -> None:
    silent = Measured(0, begin=1.0, end=5.0, first_event=2.0, output_tokens=4)
    assert (silent.ttft, silent.tpot, silent.itls) == (1.0, 1.0, [])


@pytest.mark.parametrize(
    ("cached", "changes", "told"),
    [
        (16, {}, False),  # of 100: a template's own words
        (80, {}, True),
        (80, {"prefix_len": 80}, False),
        (80, {"image_repeats": 0.9}, False),
    ],
)
def test_prompts_from_a_cache_are_remarked_on_unless_they_were_meant_to_be(
    cached: int, changes: dict[str, Any], told: bool
) -> None:
    figures = {"prompt_tokens": 100, "cached_prompt_tokens": cached}
    remark = cache_remark(Shape(input_len=10, output_len=1, **changes), figures)
    assert (remark is not None) == told
    assert not told or "80% of the prompts' tokens" in str(remark)
