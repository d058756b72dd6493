"""What the metrics say of answers, by a clock that the tests set."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from mm_engine.inputs.processed_items import ProcessedItems
from mm_engine.outputs import CompletionOutput, RequestOutput, RequestTimes
from mm_engine.plugins.record import PluginRecord
from mm_engine.request import Request
from mm_engine.sampling_params import SamplingParams
from mm_engine.server.answer import News
from mm_engine.server.metrics import REASONS, Metrics
from mm_engine.server.tally import Tally


class Clock:
    now = 100.0


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics(PluginRecord("mm-x", "1.0", "X", "mm_x.plugin"), ProcessedItems(0))


@pytest.fixture
def tally(metrics: Metrics, clock: Clock) -> Callable[..., Tally]:
    """`tally(7, 9, n=2)`: of two requests with prompts of so many tokens."""

    def make(*num_tokens: int, n: int = 1) -> Tally:
        requests = [
            Request(str(i), (1,) * num, SamplingParams(n=n)) for i, num in enumerate(num_tokens)
        ]
        return Tally(requests, metrics, clock.now)

    return make


def summed(metrics: Metrics, name: str) -> tuple[float, float]:
    """Count and sum of a histogram."""
    count, total = (
        metrics.registry.get_sample_value(f"mm_engine_{name}_{what}") for what in ("count", "sum")
    )
    assert count is not None and total is not None
    return count, pytest.approx(total)


def ended(metrics: Metrics) -> dict[str, float | None]:
    get = metrics.registry.get_sample_value
    return {
        reason: get("mm_engine_request_success_total", {"finished_reason": reason})
        for reason in REASONS
    }


@pytest.fixture
def news(clock: Clock) -> Callable[..., News]:
    """`news(1, 0, "stop")`: that of prompt 1, a token of its completion 0, its last one."""

    def make(
        prompt: int,
        index: int = 0,
        reason: str | None = None,
        times: RequestTimes | None = None,
        num_tokens: int = 1,
    ) -> News:
        completion = CompletionOutput(index, "x", [5] * num_tokens, finish_reason=reason)
        output = RequestOutput("r", [completion], reason is not None, times=times)
        return News(prompt, output, clock.now)

    return make


def test_an_answer_is_in_every_histogram_once(metrics, clock, tally, news) -> None:
    counting = tally(7)
    clock.now += 1
    counting.add(news(0, times=RequestTimes(0.25, 0.5)))
    for pause, reason in ((2, None), (4, "length")):
        clock.now += pause
        counting.add(news(0, reason=reason))
    clock.now += 50
    counting.close("abort")
    counting.close("error")
    assert summed(metrics, "request_queue_time_seconds") == (1, 0.25)
    assert summed(metrics, "request_prefill_time_seconds") == (1, 0.5)
    assert summed(metrics, "request_decode_time_seconds") == (1, 6)
    assert summed(metrics, "request_time_per_output_token_seconds") == (1, 3)
    assert summed(metrics, "inter_token_latency_seconds") == (2, 6)
    assert summed(metrics, "request_prompt_tokens") == (1, 7)
    assert summed(metrics, "request_generation_tokens") == (1, 3)
    assert ended(metrics) == {"stop": 0, "length": 1, "abort": 0, "error": 0}


def test_completions_count_by_themselves_and_prompts_once(metrics, clock, tally, news) -> None:
    counting = tally(7, 9, n=2)
    for prompt in range(2):
        counting.add(news(prompt, 0))
        counting.add(news(prompt, 1, "stop"))
        clock.now += 3
        counting.add(news(prompt, 0, "length"))
    counting.close("abort")
    assert summed(metrics, "request_prompt_tokens") == (2, 16)
    assert summed(metrics, "request_generation_tokens") == (4, 6)
    assert summed(metrics, "request_decode_time_seconds") == (4, 6)
    assert ended(metrics) == {"stop": 2, "length": 2, "abort": 0, "error": 0}


def test_a_single_token_has_no_time_to_the_next(metrics, tally, news) -> None:
    tally(7).add(news(0, reason="stop"))
    assert summed(metrics, "request_time_per_output_token_seconds") == (0, 0)
    assert summed(metrics, "request_decode_time_seconds") == (1, 0)


@pytest.mark.parametrize("num_first", [1, 3])
def test_tokens_that_are_told_together_share_the_time(
    metrics, clock, tally, news, num_first: int
) -> None:
    """With drafts, where several tokens make one character, or in an interval."""
    counting = tally(7)
    clock.now += 1
    counting.add(news(0, num_tokens=num_first))
    for pause, num_tokens, reason in ((2, 4, None), (4, 1, None), (8, 2, "length")):
        clock.now += pause
        counting.add(news(0, reason=reason, num_tokens=num_tokens))
    num_tokens = num_first + 7
    assert counting.usage["completion_tokens"] == num_tokens
    assert summed(metrics, "time_to_first_token_seconds") == (1, 1)
    assert summed(metrics, "inter_token_latency_seconds") == (num_tokens - 1, 14)
    name = "mm_engine_inter_token_latency_seconds_bucket"
    waits = [metrics.registry.get_sample_value(name, {"le": le}) for le in ("0.005", "0.5", "5.0")]
    # Of the first ones nobody waits for those behind; then four shared 2 s, one had 4, two had 8.
    assert waits == [num_first - 1, num_first - 1 + 4, num_tokens - 1]
    assert summed(metrics, "request_decode_time_seconds") == (1, 14)
    assert summed(metrics, "request_time_per_output_token_seconds") == (
        1,
        14 / (num_tokens - 1),
    )
    assert summed(metrics, "request_generation_tokens") == (1, num_tokens)


def test_an_output_without_tokens_is_no_token(metrics, clock, tally, news) -> None:
    """What is held back of the text may come when the tokens are told already."""
    counting = tally(7)
    clock.now += 1
    counting.add(news(0))
    clock.now += 2
    counting.add(news(0, reason="stop", num_tokens=0))
    assert summed(metrics, "inter_token_latency_seconds") == (0, 0)
    assert summed(metrics, "request_decode_time_seconds") == (1, 0)
    assert summed(metrics, "request_generation_tokens") == (1, 1)


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_what_is_left_unfinished_counts_with_the_reason(
    metrics, clock, tally, news, reason: str
) -> None:
    counting = tally(7, n=3)
    counting.add(news(0, 0, "stop"))
    counting.add(news(0, 1))
    clock.now += 2
    counting.add(news(0, 1))
    counting.close(reason)
    assert ended(metrics) == {**dict.fromkeys(REASONS, 0), "stop": 1, reason: 2}
    assert summed(metrics, "request_generation_tokens") == (3, 3)
    assert summed(metrics, "request_decode_time_seconds") == (2, 2)  # the third said nothing
