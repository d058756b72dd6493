"""An image that is encoded in slices: the same features, one at a time, and given up whole."""

from __future__ import annotations

import gc
import threading
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
from mm_engine.worker.loader import open_model
from mm_engine.worker.model_runner import ModelRunner
from parity import Case, Oracle, picture
from sequences import make_item, make_sequence


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
    while not num_slices or not runner.encoder.slice_is_last:
        runner.run(ScheduledBatch((), encode_slice=EncodeSlice(item, 0.0)))
        num_slices += 1
    assert num_slices > 10, "each of no time, so each ends at the next place to rest"
    runner.run(ScheduledBatch((), encode=(image("whole"),)))
    assert torch.equal(runner.encoder.features["sliced"], runner.encoder.features["whole"])
    assert runner.encoder.num_encoded == 2


def test_the_rest_can_be_encoded_in_the_step_that_needs_it(runner: ModelRunner) -> None:
    item = image("begun")
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(item, 0.0)))
    assert not runner.encoder.slice_is_last
    assert "begun" not in runner.encoder.features
    runner.run(ScheduledBatch((), encode=(item, image("other", seed=2))))
    assert runner.encoder.slice_is_last
    assert runner.encoder.features.keys() == {"begun", "other"}
    assert runner.encoder.num_encoded == 2


def test_the_model_is_never_asked_for_two_images_at_once(runner: ModelRunner) -> None:
    item = image("begun")
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(item, 0.0)))
    assert not runner.encoder.slice_is_last
    runner.run(ScheduledBatch((), encode=(image("other", seed=2),)))
    assert runner.encoder.slice_is_last
    assert runner.encoder.features.keys() == {"begun", "other"}
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(item, 0.0)))
    assert runner.encoder.slice_is_last
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
    assert runner.encoder.slice_is_last
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
    assert not runner.encoder.slice_is_last
    while not runner.encoder.slice_is_last:
        runner.run(ScheduledBatch((), encode_slice=other))
    assert runner.encoder.features.keys() == {"begun", "other"}


def test_without_a_thread_the_step_that_needs_an_image_encodes_it_whole(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    runner.run(ScheduledBatch((), encode_slice=EncodeSlice(image("x"), 0.0)))
    assert runner.encoder.slice_is_last and not runner.encoder.features
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
        if runner.encoder.slice_is_last:
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

    def watched(in_flight: ScheduledBatch | None) -> ScheduledBatch:
        batch = schedule(in_flight)
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
    (token,) = runner.run(batch).tokens
    assert token.token_id is not None
    assert not runner.encoder.slice_is_last
