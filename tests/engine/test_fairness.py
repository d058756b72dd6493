"""Who waits for whom, in simulated time: decodes for prompts, prompts for decodes, ranks."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from statistics import quantiles

import numpy as np
import pytest

from mm_engine.config import EngineConfig
from mm_engine.engine.engine import Engine
from mm_engine.engine.pace import MIN_PROMPT_TOKENS, Pace
from mm_engine.sequence import SampledToken, ScheduledBatch, StepResult
from sequences import AtOnce

#: Tokens in a step, seconds: a language model of 0.5B parameters on two cores.
TIMES = [(1, 0.020), (8, 0.029), (32, 0.061), (128, 0.23), (512, 0.97), (2048, 4.0)]
ITEM_SECONDS = 1.0  # that an image takes in the encoder
NUM_ROWS = 576  # that it makes


def step_seconds(num_tokens: int) -> float:
    """What a step takes, by the table alone: `Pace`, which is tested, has no say in it."""
    assert num_tokens <= TIMES[-1][0]
    return float(np.interp(num_tokens, *zip(*TIMES, strict=True)))


class TimedRunner(AtOnce):
    """Computes nothing, and takes its time: `now` is the clock of the simulation."""

    def __init__(self) -> None:
        self.now = 0.0
        self.times: dict[str, list[float]] = defaultdict(list)  # of each request's tokens
        self.steps: list[ScheduledBatch] = []
        self.num_decodes: list[int] = []  # in each step
        self._begun: dict[str, float] = {}  # seconds of encoding

    @property
    def slice_is_last(self) -> bool:
        return not self._begun

    def run(self, batch: ScheduledBatch) -> StepResult:
        if batch.encode_slice is not None:
            key = batch.encode_slice.item.content_key
            left = ITEM_SECONDS - self._begun.get(key, 0.0)
            spent = min(left, batch.encode_slice.seconds)
            self.now += spent
            self._begun[key] = self._begun.get(key, 0.0) + spent
            if spent == left:
                del self._begun[key]
        for key in batch.evict:
            self._begun.pop(key, None)
        for item in batch.encode:
            self.now += ITEM_SECONDS - self._begun.pop(item.content_key, 0.0)
        if batch.sequences:
            self.now += step_seconds(batch.num_tokens)
        self.steps.append(batch)
        self.num_decodes.append(
            sum(share.start >= share.sequence.num_prompt_tokens for share in batch.sequences)
        )
        for share in batch.sequences:
            if share.samples:
                self.times[share.sequence.request.request_id].append(self.now)
        sampled = [SampledToken(65 if share.samples else None) for share in batch.sequences]
        return StepResult(sampled, self.slice_is_last)


class Simulation:
    """An engine whose steps take simulated time; requests arrive at given moments."""

    def __init__(
        self,
        tokenizer,
        new_request,
        *,
        slowdown: float | None,
        num_images: int = 8,
        slices_images: bool = True,
        pace: Pace | None = None,
        **options,
    ) -> None:
        self.runner = TimedRunner()
        self.engine = Engine(
            self.runner,
            EngineConfig(model="none", enable_prefix_caching=False, **options),
            tokenizer,
            num_blocks=4096,
            max_encoder_rows=num_images * NUM_ROWS,
            pace=pace if slowdown is None else Pace(TIMES, slowdown),
            clock=lambda: self.runner.now,
            slices_images=slices_images,
        )
        self.new_request = new_request
        self.arrivals: list[tuple[float, str]] = []

    def streams(self, number: int, max_tokens: int) -> None:
        """So many answers to short questions, already under way."""
        for i in range(number):
            self.ask(f"stream {i}", [1 + i], max_tokens=max_tokens)
        while any(not self.runner.times[f"stream {i}"] for i in range(number)):
            self.engine.step()

    def ask(self, name: str, parts: list[int | str], **params) -> None:
        lengths = {part: NUM_ROWS for part in parts if isinstance(part, str)}
        params = {"max_tokens": 16, "ignore_eos": True, **params}
        self.engine.add(self.new_request(name, parts, lengths=lengths, **params))

    def run(self, images_every: float = float("inf"), until: float = float("inf")) -> None:
        """Step to the end; a question about a new image comes every so many seconds."""
        start, number = self.runner.now, 0
        while self.engine.has_work and self.runner.now - start < until:
            if self.runner.now - start >= (number + 1) * images_every:
                number += 1
                name = f"image {number}"
                self.arrivals.append((self.runner.now, name))
                self.ask(name, [5, name, 30])
            self.engine.step()

    def p99_itl(self) -> float:
        """Between one token of a stream and the next, in seconds."""
        gaps = [
            after - before
            for name, times in self.runner.times.items()
            if name.startswith("stream")
            for before, after in pairwise(times)
        ]
        return quantiles(gaps, n=100)[98]

    def ttfts(self) -> list[float]:
        return [self.runner.times[name][0] - came for came, name in self.arrivals]


@pytest.fixture
def simulate(tokenizer, new_request):
    def make(slowdown: float | None, **options) -> Simulation:
        return Simulation(tokenizer, new_request, slowdown=slowdown, **options)

    return make


def test_arriving_images_at_most_double_what_eight_streams_wait_between_tokens(simulate) -> None:
    p99 = {}
    for slowdown, images_every in ((1.75, float("inf")), (1.75, 3.0), (1.75, 6.0), (None, 3.0)):
        simulation = simulate(slowdown)
        simulation.streams(8, max_tokens=1500)
        simulation.run(images_every)
        p99[slowdown, images_every] = simulation.p99_itl()
        if images_every == 6.0:
            assert len(simulation.arrivals) >= 8
            assert max(simulation.ttfts()) < 6, "nor do the prompts pile up"
    alone = p99[1.75, float("inf")]
    assert alone == pytest.approx(0.029)
    assert p99[1.75, 3.0] <= 2 * alone
    assert p99[1.75, 6.0] <= 2 * alone
    assert p99[None, 3.0] > 30 * alone, "the positive control: without a bound they wait"


@pytest.mark.parametrize("factor", [0.25, 4.0])
def test_what_was_timed_beside_a_neighbour_is_corrected(simulate, factor: float) -> None:
    wrong = Pace([(size, factor * seconds) for size, seconds in TIMES], 1.75)
    simulation = simulate(None, pace=wrong)
    simulation.streams(8, max_tokens=1500)
    simulation.run(images_every=6.0)
    runner = simulation.runner
    assert simulation.p99_itl() <= 1.75 * step_seconds(8) + 1e-9
    assert max(simulation.ttfts()) < 6, "nor do the prompts pile up"
    assert any(step.encode_slice for step in runner.steps)


@pytest.mark.parametrize("slowdown", [1.25, 1.75, 3.0])
def test_no_step_with_decodes_takes_longer_than_the_bound(simulate, slowdown: float) -> None:
    simulation = simulate(slowdown)
    simulation.streams(8, max_tokens=400)
    simulation.ask("text", [1500])
    simulation.run(images_every=3.0)
    runner, num_slices = simulation.runner, 0
    for step, num_decodes in zip(runner.steps, runner.num_decodes, strict=True):
        if not num_decodes:
            continue
        seconds = step_seconds(step.num_tokens)
        if step.encode_slice is not None:
            seconds += step.encode_slice.seconds
            num_slices += 1
        longest = slowdown * step_seconds(num_decodes)
        least = step_seconds(num_decodes + MIN_PROMPT_TOKENS)
        assert seconds <= max(longest, least) + 1e-9
        assert not step.encode
    assert num_slices


@pytest.mark.parametrize("slowdown", [1.0001, 1.75])
def test_decodes_that_never_end_do_not_starve_a_prompt(simulate, slowdown: float) -> None:
    simulation = simulate(slowdown)
    simulation.streams(63, max_tokens=100_000 // 63)
    simulation.ask("long", [900], max_tokens=1)
    num_steps = len(simulation.runner.steps)
    while not simulation.runner.times["long"]:
        simulation.engine.step()
    assert len(simulation.runner.steps) - num_steps <= 900 // MIN_PROMPT_TOKENS + 2


def test_an_image_is_encoded_however_little_time_the_decodes_spare(simulate) -> None:
    simulation = simulate(1.1)
    simulation.streams(8, max_tokens=2000)
    simulation.ask("image", [5, "picture", 30], max_tokens=1)
    while not simulation.runner.times["image"]:
        simulation.engine.step()
    slices = [step.encode_slice for step in simulation.runner.steps if step.encode_slice]
    assert len(slices) > 100
    assert simulation.engine.stats().num_encodes == 1
    assert simulation.engine.stats().num_encoder_hits == 0


def test_two_prompts_with_one_image_wait_for_one_encoding(simulate) -> None:
    simulation = simulate(1.75)
    simulation.streams(8, max_tokens=400)
    simulation.ask("first", [5, "picture", 30], max_tokens=1)
    simulation.ask("second", [9, "picture", 3], max_tokens=1)
    simulation.run()
    assert simulation.runner.times["second"]
    stats = simulation.engine.stats()
    assert (stats.num_encodes, stats.num_encoder_hits) == (1, 1)


def test_without_decodes_a_step_takes_all_that_fits(simulate) -> None:
    simulation = simulate(1.75)
    for i in range(3):
        simulation.ask(f"image {i}", [5, f"picture {i}", 30], max_tokens=1)
    simulation.run()
    assert [len(step.encode) for step in simulation.runner.steps] == [3]


def test_the_rest_of_an_image_is_encoded_at_once_when_the_decodes_have_ended(simulate) -> None:
    simulation = simulate(1.75)
    simulation.streams(8, max_tokens=10)
    simulation.ask("image", [5, "picture", 30], max_tokens=1)
    simulation.run()
    steps = simulation.runner.steps
    assert sum(step.encode_slice is not None for step in steps) >= 5
    assert [len(step.encode) for step in steps[-1:]] == [1]
    assert simulation.engine.stats().num_encodes == 1


def test_what_cannot_slice_encodes_images_whole_and_prompts_keep_the_pace(simulate) -> None:
    simulation = simulate(1.75, slices_images=False)
    simulation.streams(8, max_tokens=200)
    for i in range(3):
        simulation.ask(f"image {i}", [5, f"picture {i}", 30], max_tokens=1)
    simulation.run()
    runner = simulation.runner
    assert not any(step.encode_slice for step in runner.steps)
    assert [len(step.encode) for step in runner.steps if step.encode] == [1, 1, 1]
    bound = 1.75 * step_seconds(8)
    beside = [s for s, n in zip(runner.steps, runner.num_decodes, strict=True) if n == 8]
    assert all(step_seconds(step.num_tokens) <= bound for step in beside)


def test_a_draft_takes_no_more_time_than_the_decodes_spare(simulate) -> None:
    most = {}
    for slowdown in (1.75, None):
        simulation = simulate(slowdown, num_speculative_tokens=20)
        simulation.streams(8, max_tokens=60)
        simulation.run()
        runner = simulation.runner
        steps = [s for s, n in zip(runner.steps, runner.num_decodes, strict=True) if n == 8]
        most[slowdown] = max(step_seconds(step.num_tokens) for step in steps)
        assert any(share.draft_token_ids for step in steps for share in step.sequences)
    assert most[1.75] <= 1.75 * 0.029 + 1e-9
    assert most[None] > 5 * 0.029, "the positive control"


def test_an_image_of_a_worse_priority_that_holds_the_cache_is_brought_to_its_end(simulate) -> None:
    """Only one fits. The first in rank waits for its rows, so it gets the time of those behind."""
    simulation = simulate(1.75, num_images=1)
    simulation.streams(8, max_tokens=4000)
    simulation.ask("last", [5, "picture", 30], priority=5)
    for _ in range(3):
        simulation.engine.step()
    assert not simulation.runner.slice_is_last
    simulation.ask("first", [100, "another", 30], priority=-1)
    number = 0
    while not simulation.runner.times["first"]:
        assert number < 200, "the first in rank starves"
        simulation.ask(f"text {number}", [800], max_tokens=1)
        number += 1
        for _ in range(5):
            simulation.engine.step()


def test_an_image_that_somebody_else_wants_is_not_given_up(simulate) -> None:
    simulation = simulate(1.75)
    simulation.streams(8, max_tokens=400)
    simulation.ask("first", [5, "picture", 30])
    simulation.ask("second", [9, "picture", 3], max_tokens=1)
    for _ in range(5):
        simulation.engine.step()
    assert not simulation.runner.slice_is_last
    simulation.engine.abort("first")
    simulation.run()
    assert simulation.runner.times["second"]
    assert simulation.engine.stats().num_encodes == 1
    assert not any(step.evict for step in simulation.runner.steps)


def test_an_image_that_nobody_wants_holds_up_nobody(simulate) -> None:
    """The streams have ended too: its rest would be encoded at once, in a step of others."""
    simulation = simulate(1.75)
    simulation.streams(8, max_tokens=400)
    simulation.ask("image", [5, "picture", 30])
    for _ in range(5):
        simulation.engine.step()
    for name in ["image", *(f"stream {i}" for i in range(8))]:
        simulation.engine.abort(name)
    asked = simulation.runner.now
    simulation.ask("text", [30], max_tokens=1)
    simulation.run()
    assert simulation.runner.times["text"][0] - asked < 0.1 < ITEM_SECONDS


def test_an_abort_in_the_middle_of_an_images_encoding_leaks_nothing(simulate) -> None:
    simulation = simulate(1.75)
    simulation.streams(8, max_tokens=40)
    simulation.ask("image", [5, "picture", 30])
    for _ in range(5):
        simulation.engine.step()
    assert not simulation.runner.slice_is_last
    for name in ["image", *(f"stream {i}" for i in range(8))]:
        simulation.engine.abort(name)
    simulation.run()
    assert simulation.runner.slice_is_last, "nothing is left half encoded"
    stats = simulation.engine.stats()
    assert stats.num_used_blocks == stats.num_running == stats.num_waiting == 0
    assert simulation.engine.encoder_cache.num_rows == 0, "it was given up"
    simulation.ask("again", [5, "picture", 30])
    simulation.run()
    assert (simulation.engine.stats().num_encodes, len(simulation.runner.times["again"])) == (2, 16)


def test_prompts_are_read_in_order_of_arrival_beside_decodes(simulate) -> None:
    simulation = simulate(1.75)
    simulation.streams(8, max_tokens=400)
    for name in ("first", "second", "third"):
        simulation.ask(name, [300], max_tokens=1)
        simulation.engine.step()
    simulation.run()
    times = [simulation.runner.times[name][0] for name in ("first", "second", "third")]
    assert times == sorted(times)
    assert times[1] - times[0] > 0.5
