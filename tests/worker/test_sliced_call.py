"""A call in slices of time: as good as whole, one at a time, and no thread is left behind."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from checkpoints import IMAGE_SIZE, make_llava
from mm_engine import LLM, SamplingParams
from mm_engine.config import EngineConfig
from mm_engine.engine.pace import Pace
from mm_engine.errors import PluginError
from mm_engine.request import PromptInputs, Request
from mm_engine.sequence import EncodeSlice, ScheduledBatch, ScheduledSequence
from mm_engine.worker import sliced_call
from mm_engine.worker.loader import open_model
from mm_engine.worker.model_runner import ModelRunner
from mm_engine.worker.sliced_call import SlicedCall
from parity import Case, Oracle, picture
from sequences import make_item, make_sequence

PIECE = 1.0  # seconds of the clock
PAUSE = 0.1  # real seconds in which what must rest could go on


class Clock:
    """Goes on only where a `Slow` computes: never more than one thread does."""

    def __init__(self) -> None:
        self.now = 1000.0

    def perf_counter(self) -> float:
        return self.now


CLOCK = Clock()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sliced_call, "time", CLOCK)


class Slow(nn.Module):
    """Takes a while."""

    def forward(self, x: Tensor) -> Tensor:
        CLOCK.now += PIECE
        return x + 1


def stack(number: int) -> list[nn.Module]:
    return [Slow() for _ in range(number)]


def apply(modules: list[nn.Module]) -> Tensor:
    x = torch.zeros(())
    for module in modules:
        x = module(x)
    return x


class Applied(SlicedCall):
    """Applies modules; `results` has what came of it."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self.results: list[float] = []
        super().__init__(lambda: self.results.append(apply(modules).item()), modules)


@pytest.mark.parametrize(
    ("num_pieces", "ends"),
    [
        (4.0, [4, 8, 12, 16, 20, 20]),
        (3.6, [4, 8, 12, 16, 20, 20]),
        (3.4, [3, 6, 9, 12, 15, 18, 20]),
    ],
)
@pytest.mark.usefixtures("clock")
def test_each_slice_ends_where_its_time_is_nearest(num_pieces: float, ends: list[int]) -> None:
    modules, start = stack(20), CLOCK.now
    call, passed = Applied(modules), []
    while not call.ended:
        call.run(num_pieces * PIECE)
        passed.append((CLOCK.now - start) / PIECE)
    assert passed == ends  # the last may have just what comes behind the last place to rest
    assert call.results == [20]


@pytest.mark.usefixtures("clock")
def test_between_slices_nothing_runs() -> None:
    modules, done = stack(10), []
    for module in modules:
        module.register_forward_hook(lambda *_: done.append(1))
    call = Applied(modules)
    time.sleep(PAUSE)
    assert not done, "it doesn't begin by itself"
    call.run(2 * PIECE)
    assert len(done) == 2
    time.sleep(PAUSE)
    assert len(done) == 2


@pytest.mark.usefixtures("clock")
def test_the_last_slice_has_no_end() -> None:
    modules = stack(10)
    call = Applied(modules)
    call.run(PIECE)
    assert not call.ended
    call.run()
    assert call.ended
    call.run()  # an ended call has nothing to do
    assert call.results == [10]


@pytest.mark.usefixtures("clock")
def test_what_the_call_raises_is_kept_and_the_thread_ends() -> None:
    modules = stack(3)

    def fail() -> None:
        apply(modules)
        raise SystemExit("a plugin's wish")

    call = SlicedCall(fail, modules)
    while not call.ended:
        call.run(PIECE)
    assert isinstance(call.error, SystemExit)
    call._thread.join(30)
    assert not call._thread.is_alive()
    assert all(not module._forward_hooks for module in modules), "the places to rest are gone"


def test_a_module_that_takes_no_hooks_fails_the_call_and_holds_up_nobody() -> None:
    class Refusing(nn.Module):
        def register_forward_hook(self, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("no hooks here")

    call = Applied([*stack(1), Refusing()])
    call.run()
    assert call.ended and isinstance(call.error, RuntimeError)


@pytest.mark.parametrize("num_slices", [0, 1])
def test_a_call_that_is_cancelled_unwinds_where_it_rests(num_slices: int) -> None:
    modules, done, left = stack(10), [], []
    for module in modules:
        module.register_forward_hook(lambda *_: done.append(1))

    def call_them() -> None:
        try:
            apply(modules)
        except Exception:  # a plugin may catch what is its own
            left.append("caught")
        finally:
            left.append("unwound")

    call = SlicedCall(call_them, modules)
    for _ in range(num_slices):
        call.run(0.0)
    call.cancel()
    assert call.ended
    assert len(done) == num_slices
    assert left == ["unwound"] * num_slices
    call._thread.join(30)
    assert not call._thread.is_alive()


@pytest.mark.usefixtures("clock")
def test_others_may_use_the_modules_meanwhile() -> None:
    modules = stack(6)
    call = Applied(modules)
    call.run(PIECE)
    assert not call.ended
    assert apply(modules).item() == 6, "it doesn't rest for the call's slices"
    call.run()
    assert call.results == [6]


# --- with a real model -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture
def runner(checkpoint: Path) -> ModelRunner:
    config = EngineConfig(model=str(checkpoint), device="cpu", block_size=4, progress=False)
    runner = ModelRunner(open_model(config), config)
    runner.init_cache(16)
    return runner


def image(key: str, seed: int = 1) -> Any:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return make_item(key, 2, 16, pixel_values=pixels)


def test_features_are_those_of_an_image_encoded_whole(runner: ModelRunner) -> None:
    item = image("sliced")
    num_slices = 0
    while not num_slices or not runner.slice_is_last:
        runner.run(ScheduledBatch((), encode_slice=EncodeSlice(item, 0.0)))
        num_slices += 1
    assert num_slices > 10, "each of no time, so each ends at the next place to rest"
    runner.run(ScheduledBatch((), encode=(image("whole"),)))
    assert torch.equal(runner.encoder.features["sliced"], runner.encoder.features["whole"])
    assert runner.encoder.num_encoded == 2


def test_the_rest_can_be_encoded_in_the_step_that_needs_it(runner: ModelRunner) -> None:
    item = image("begun")
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(item, 0.0)))
    assert not runner.slice_is_last
    assert "begun" not in runner.encoder.features
    runner.run(ScheduledBatch((), encode=(item, image("other", seed=2))))
    assert runner.slice_is_last
    assert runner.encoder.features.keys() == {"begun", "other"}
    assert runner.encoder.num_encoded == 2


def test_the_model_is_never_asked_for_two_images_at_once(runner: ModelRunner) -> None:
    item = image("begun")
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(item, 0.0)))
    assert not runner.slice_is_last
    runner.run(ScheduledBatch((), encode=(image("other", seed=2),)))
    assert runner.slice_is_last
    assert runner.encoder.features.keys() == {"begun", "other"}
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(item, 0.0)))
    assert runner.slice_is_last
    assert runner.encoder.num_encoded == 2, "what is whole isn't encoded again"


def test_an_image_that_is_evicted_half_encoded_is_given_up(runner: ModelRunner) -> None:
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(image("begun"), 0.0)))
    call = weakref.ref(runner.encoder._sliced[1])
    thread = call()._thread
    gc.disable()  # what unwound may not wait for it
    try:
        runner.run(ScheduledBatch((), evict=("begun",)))
        thread.join(30)
        assert not thread.is_alive()
        del thread
        assert call() is None
    finally:
        gc.enable()
    assert runner.slice_is_last
    assert not runner.encoder.features and not runner.encoder._failures
    runner.run(ScheduledBatch((), encode=(image("begun"),)))
    assert runner.encoder.num_encoded == 1


def test_what_a_step_left_half_encoded_is_brought_to_its_end_before_another(
    runner: ModelRunner,
) -> None:
    """Ctrl-C may end a step before the rest of an image was encoded: the plan forgets it then."""
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(image("begun"), 0.0)))
    other = EncodeSlice(image("other", seed=2), 0.0)
    runner.run(ScheduledBatch((), encode_slice=other))
    assert runner.encoder.features.keys() == {"begun"}
    assert not runner.slice_is_last
    while not runner.slice_is_last:
        runner.run(ScheduledBatch((), encode_slice=other))
    assert runner.encoder.features.keys() == {"begun", "other"}


def test_without_a_thread_the_step_that_needs_an_image_encodes_it_whole(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(image("x"), 0.0)))
    assert runner.slice_is_last and not runner.encoder.features
    runner.run(ScheduledBatch((), encode=(image("x"),)))
    assert runner.encoder.features.keys() == {"x"}


@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
def test_a_scripted_tower_is_encoded_in_slices_too(runner: ModelRunner) -> None:
    runner.model.extra = torch.jit.script(nn.Sequential(nn.ReLU()))
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(image("x"), float("inf"))))
    assert runner.encoder.features.keys() == {"x"}


def test_a_failure_that_is_kept_holds_no_tensors(runner: ModelRunner) -> None:
    pixels = torch.full((3, IMAGE_SIZE, IMAGE_SIZE), torch.nan)
    alive = weakref.ref(pixels)
    bad = make_item("bad", 2, 16, pixel_values=pixels)
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(bad, float("inf"))))
    del bad, pixels
    assert runner.encoder._failures.keys() == {"bad"}
    gc.collect()
    assert alive() is None


def test_an_exception_that_is_its_own_cause_holds_up_nobody(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(**tensors: Tensor) -> list[Tensor]:
        error = ValueError("around")
        raise error from error

    monkeypatch.setattr(runner.model, "embed_images", fail)
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(image("x"), float("inf"))))
    assert "ValueError" in str(runner.encoder.encode([image("x")])["x"])


def test_a_failure_is_told_to_the_step_that_needs_the_image_and_only_once(
    runner: ModelRunner,
) -> None:
    bad = make_item("bad", 2, 16, pixel_values=torch.full((3, IMAGE_SIZE, IMAGE_SIZE), torch.nan))
    while True:
        runner.run(ScheduledBatch((), encode_slice=EncodeSlice(bad, 0.0)))
        if runner.slice_is_last:
            break
    assert "bad" not in runner.encoder.features
    errors = runner.encoder.encode([bad, image("good")])
    assert errors.keys() == {"bad"}
    assert isinstance(errors["bad"], PluginError)
    assert "embed_images" in str(errors["bad"])
    assert runner.encoder.features.keys() == {"good"}
    assert not runner.encoder._failures


def test_the_failure_of_an_image_that_nobody_needs_any_more_is_forgotten(
    runner: ModelRunner,
) -> None:
    bad = make_item("bad", 2, 16, pixel_values=torch.full((3, IMAGE_SIZE, IMAGE_SIZE), torch.nan))
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(bad, float("inf"))))
    assert runner.encoder._failures.keys() == {"bad"}
    runner.run(ScheduledBatch((), evict=("bad",)))
    assert not runner.encoder._failures


def test_answers_are_the_same_beside_decodes_that_keep_their_pace(checkpoint: Path) -> None:
    """Chunks as the pace allows, images in slices: each answer is what it is alone."""
    options = {"dtype": "float32", "block_size": 4, "progress": False, "max_num_seqs": 8}
    paced, free = LLM(str(checkpoint), **options), LLM(str(checkpoint), **options)
    # So short that each slice is one leaf: which steps there are is no matter of the machine.
    paced.engine.scheduler.pace = Pace([(1, 1e-9), (64, 64e-9)], 1.2)
    paced.engine._clock = None  # or it would be corrected
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    long = SamplingParams(temperature=0.0, max_tokens=60, ignore_eos=True)
    texts = [f"USER: Say {i}. ASSISTANT:" for i in range(2)]
    looks = [f"USER: Look at {i}: <image>\nWhat is it? ASSISTANT:" for i in range(3)]
    cases = [Case(text) for text in texts]
    cases += [Case(text, (picture(i),)) for i, text in enumerate(looks)]

    def requests(llm: LLM) -> list[Request]:
        made = []
        for case in cases:
            data = {"image": case.images} if case.images else {}
            prepared = llm.pipeline.prepare(PromptInputs(case.prompt, multi_modal_data=data))
            sampling = params if case.images else long
            made.append(llm.pipeline.request(prepared, sampling, str(len(made))))
        return made

    answers: dict[str, list[int]] = {}
    slices = []

    def step(llm: LLM, sums: dict[str, list[int]]) -> None:
        for output in llm.engine.step():
            for new in output.outputs:
                sums.setdefault(output.request_id, []).extend(new.token_ids)

    schedule = paced.engine.scheduler.schedule

    def watched() -> ScheduledBatch:
        batch = schedule()
        slices.extend([batch.encode_slice] if batch.encode_slice else [])
        return batch

    paced.engine.scheduler.schedule = watched  # type: ignore[method-assign]
    asked = requests(paced)
    for request in asked[:2]:
        paced.engine.add(request)
    step(paced, answers)
    for request in asked[2:]:
        paced.engine.add(request)
    while paced.engine.has_work:
        step(paced, answers)
    assert slices, "the others have not ended before the first image is whole"
    oracle = Oracle(checkpoint)
    for case, request in zip(cases, requests(free), strict=True):
        alone: dict[str, list[int]] = {}
        free.engine.add(request)
        while free.engine.has_work:
            step(free, alone)
        oracle.check(case, alone[request.request_id], answers[request.request_id])


def test_sequences_made_by_hand_touch_no_image_while_it_is_encoded(runner: ModelRunner) -> None:
    """A decode runs in the same step as the slice, on its own."""
    decode = make_sequence((1, 9, 20), temperature=0.0)
    decode.block_table = [0, 1]
    batch = ScheduledBatch(
        (ScheduledSequence(decode, 3),), encode_slice=EncodeSlice(image("x"), 0.0)
    )
    (token,) = runner.run(batch)
    assert token.token_id is not None
    assert not runner.slice_is_last
