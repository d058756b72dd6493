"""What a step costs, by what was measured, and what fits beside decodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_engine.config import EngineConfig
from mm_engine.engine.engine import Engine
from mm_engine.engine.pace import NUM_OBSERVED, Pace
from mm_engine.outputs import ErrorInfo
from mm_engine.sequence import SampledToken, ScheduledBatch, StepResult
from sequences import AtOnce

TIMES = [(1, 1.0), (4, 1.0), (8, 3.0)]


def test_times_rise_evenly_between_what_was_measured_and_in_proportion_behind_it() -> None:
    pace = Pace(TIMES, 2.0)
    measured = {0: 1.0, 1: 1.0, 3: 1.0, 4: 1.0, 5: 1.5, 7: 2.5, 8: 3.0, 10: 3.75, 80: 30.0}
    assert {size: pace.seconds(size) for size in measured} == measured


def test_a_smaller_step_that_took_longer_was_held_up_by_a_neighbour() -> None:
    pace = Pace([(1, 9.0), (2, 4.0), (4, 1.0), (8, 3.0)], 2.0)
    assert [pace.seconds(size) for size in (1, 2, 3, 4, 6, 8)] == [1.0, 1.0, 1.0, 1.0, 2.0, 3.0]


def test_where_timing_ended_early_nothing_is_promised_beyond() -> None:
    """The two last took the same time: that doesn't make a thousand tokens free."""
    pace = Pace([(1, 2.0), (2, 2.0)], 1.5)
    assert pace.seconds(1000) == 1000.0
    assert pace.spare_seconds(64) == pace.spare_seconds(2) == 1.0
    assert pace.num_tokens_more(2, 1.0, 50) == 1
    assert Pace([(1, 2.0)], 1.5).num_tokens_more(1, 1.0, 50) == 0


def test_times_follow_the_fastest_of_the_newest_steps() -> None:
    pace = Pace(TIMES, 2.0)
    pace.observe(4, 3.0)
    assert pace.seconds(4) == 1.0, "one slow step says nothing"
    pace.observe(8, 1.5)
    assert [pace.seconds(size) for size in (1, 4, 8, 16)] == [0.5, 0.5, 1.5, 3.0]
    assert pace.spare_seconds(4) == 0.5
    assert pace.num_tokens_more(4, 0.5, 100) == 2, "tokens cost less, and less is spared"
    for _ in range(NUM_OBSERVED):
        pace.observe(1, 2.0)
    assert pace.seconds(1) == 2.0, "the machine is slower now"
    pace.observe(9, 0.1)
    assert pace.seconds(1) == 2.0, "so many tokens were never timed"


def test_a_step_that_failed_says_nothing_about_time(new_request, tokenizer) -> None:
    class Failing(AtOnce):
        def run(self, batch: ScheduledBatch) -> StepResult:
            error = ErrorInfo("PluginError", "no.")
            return StepResult([SampledToken(error=error) for _ in batch.sequences])

    pace = Pace(TIMES, 2.0)
    config = EngineConfig(model="none")
    engine = Engine(Failing(), config, tokenizer, num_blocks=64, pace=pace, clock=lambda: 0.0)
    engine.add(new_request("a", [4], max_tokens=1))
    (output,) = engine.step()
    assert output.error is not None
    assert pace.seconds(4) == 1.0


@pytest.mark.parametrize(
    ("num_decodes", "num_tokens"), [(1, 5), (4, 2), (8, 8), (6, 4)], ids=lambda value: f"{value}"
)
def test_as_many_tokens_fit_as_the_slowdown_allows(num_decodes: int, num_tokens: int) -> None:
    pace = Pace(TIMES, 2.0)
    spare = pace.spare_seconds(num_decodes)
    assert spare == pace.seconds(num_decodes)
    assert pace.num_tokens_more(num_decodes, spare, 100) == num_tokens
    assert pace.num_tokens_more(num_decodes, spare, 1) == 1


@given(
    st.lists(st.floats(0.001, 10.0), min_size=1, max_size=12),
    st.floats(1.01, 5.0),
    st.integers(1, 5000),
    st.integers(0, 5000),
)
def test_what_fits_fits_and_one_more_does_not(
    seconds: list[float], slowdown: float, num_decodes: int, most: int
) -> None:
    pace = Pace([(2**i, second) for i, second in enumerate(seconds)], slowdown)
    spare = pace.spare_seconds(num_decodes)
    limit = pace.seconds(num_decodes) + spare
    num = pace.num_tokens_more(num_decodes, spare, most)
    assert 0 <= num <= most
    assert pace.seconds(num_decodes + num) <= limit
    assert num == most or pace.seconds(num_decodes + num + 1) > limit
