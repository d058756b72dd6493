"""What goes wrong in a plugin's model is blamed on it, costs one request, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from mm_engine_kernels.reference import cut_top
from torch import Tensor

from mm_engine import LLM, SamplingParams
from mm_engine.config import EngineConfig
from mm_engine.errors import PluginError
from mm_engine.sequence import ScheduledBatch, ScheduledSequence, Sequence
from mm_engine.worker.encoder import Encoder
from mm_engine.worker.loader import open_model
from mm_engine.worker.model_runner import ModelRunner
from poisoned import NUM_BLOCKS, POISON, make_poisoned
from sequences import make_item, make_sequence

PLUGIN = """
from mm_engine.plugins import hookimpl
from mm_llava.model import LlavaForConditionalGeneration
ARCHITECTURES = ["LlavaForConditionalGeneration"]

class Model(LlavaForConditionalGeneration):
    {method}

@hookimpl
def model_class(ctx): return Model

@hookimpl
def max_tokens(ctx, modality): return 16
"""


@pytest.fixture(scope="module", params=["llama", "mistral"])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    """A model with and without a sliding window, whose token 77 is NaN."""
    return make_poisoned(tmp_path_factory.mktemp("model"), request.param)


def place(sequence: Sequence, blocks: Iterator[int]) -> Sequence:
    sequence.block_table = [next(blocks) for _ in range(5)]
    return sequence


def share(sequence: Sequence, num: int) -> ScheduledSequence:
    return ScheduledSequence(sequence, num)


def test_nan_in_the_middle_of_a_prompt_fails_at_once_and_stays_in_no_block(
    runner: ModelRunner,
) -> None:
    """Were it noticed only at the last chunk, an abort before it would leave NaN to others."""
    blocks = iter(range(NUM_BLOCKS))
    sick = place(make_sequence((1, POISON, *range(20, 30)), temperature=0.0), blocks)
    chunk = place(make_sequence((1, *range(20, 30)), temperature=0.0), blocks)
    decode = place(make_sequence((1, 50), temperature=0.0), blocks)
    results = runner.run(ScheduledBatch((share(sick, 6), share(chunk, 6), share(decode, 2)))).tokens
    error = results[0].error
    assert error is not None and error.name == "PluginError"
    assert "mm-llava" in error.message and "NaN" in error.message
    assert results[1].error is None and results[1].token_id is None
    assert results[2].error is None and results[2].token_id is not None
    for keys, values in runner.kv_caches:
        assert keys.isfinite().all() and values.isfinite().all()
        assert keys[chunk.block_table].any()


def test_nan_that_the_last_token_does_not_see_fails_the_request_too(runner: ModelRunner) -> None:
    sick = make_sequence((1, POISON, *range(20, 34)), temperature=0.0)
    place(sick, iter(range(NUM_BLOCKS)))
    (token,) = runner.run(ScheduledBatch((share(sick, 16),))).tokens
    assert token.error is not None
    assert all(cache.isfinite().all() for pair in runner.kv_caches for cache in pair)


def test_features_of_another_length_than_the_prompts_fail_the_request(
    runner: ModelRunner,
) -> None:
    """A plugin that counts one image differently in two prompts would shift all that follows."""
    blocks = iter(range(NUM_BLOCKS))
    pixels = torch.zeros(3, 32, 32)

    def prompt(length: int) -> Sequence:
        item = make_item("same", 1, length, pixel_values=pixels)
        ids = (1, *[4] * length, 20)
        return place(make_sequence(ids, items=(item,), temperature=0.0), blocks)

    (first,) = runner.run(ScheduledBatch((share(prompt(16), 18),))).tokens
    assert first.error is None and first.token_id is not None
    second, neighbour = prompt(15), prompt(16)
    results = runner.run(ScheduledBatch((share(second, 17), share(neighbour, 18)))).tokens
    assert results[0].error is not None
    assert "input_processor" in results[0].error.message
    assert "expected 16 placeholder tokens for image 0" in results[0].error.message
    assert "got 15" in results[0].error.message
    assert results[1].token_id == first.token_id
    runner.encoder.drop(["same"])


def load(llava: Path, folder: Path, method: str, **options: Any) -> LLM:
    file = folder / "own_plugin.py"
    file.write_text(PLUGIN.format(method=method))
    return LLM(str(llava), plugins=(str(file),), progress=False, **options)


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("def embed_images(self, *, pixel_values): raise SystemExit(3)", "embed_images .*SystemE"),
        ("def forward(self, *args, **options): raise SystemExit(3)", "forward .*SystemExit: 3"),
        ("def forward(self, *args, **options): return args[7]", "forward .*IndexError"),
        (
            "def compute_logits(self, hidden): return super().compute_logits(hidden) / 0",
            "compute_logits .*expected finite .*got NaN",
        ),
    ],
    ids=["encoder-exits", "forward-exits", "forward-raises", "logits-infinite"],
)
def test_what_fails_on_dummy_data_is_a_refusal_to_start(
    llava: Path, tmp_path: Path, method: str, match: str
) -> None:
    with pytest.raises(PluginError, match=r"own_plugin\.py .* · " + match):
        load(llava, tmp_path, method)


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    ("method", "code"),
    [
        (
            "compute_logits",
            "def compute_logits(self, hidden):\n"
            "        logits = super().compute_logits(hidden)\n"
            "        if len(hidden) == 2: logits[0, 5] = float('{value}')\n"
            "        return logits\n",
        ),
        (
            "compute_logits",
            "def compute_logits(self, hidden):\n"
            "        logits = super().compute_logits(hidden)\n"
            "        if len(hidden) == 2: logits[0] = -float('{value}')\n"
            "        return logits\n",
        ),
        (
            "forward",
            "def forward(self, ids, positions, metadata, **options):\n"
            "        hidden = super().forward(ids, positions, metadata, **options)\n"
            "        if len(metadata.query_lens) == 2: hidden[0, 5] = float('{value}')\n"
            "        return hidden\n",
        ),
    ],
    ids=["logit", "row", "hidden"],
)
def test_a_model_that_fails_later_fails_one_request(
    llava: Path, tmp_path: Path, method: str, code: str, value: str
) -> None:
    llm = load(llava, tmp_path, code.format(value=value))
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    expected = llm.generate("there", params)[0].outputs[0].token_ids
    failed, neighbour = llm.generate(["Hello", "there"], params)
    assert failed.error is not None and failed.finished
    assert failed.error.message.startswith("own_plugin.py")
    assert f" · {method} (" in failed.error.message and "NaN" in failed.error.message
    assert neighbour.error is None
    assert neighbour.outputs[0].token_ids == expected
    assert llm.engine.stats().num_used_blocks == 0


def test_features_are_the_encoders_own_copy(llava: Path) -> None:
    """A model may write its next result where it wrote the last."""
    plugin = open_model(EngineConfig(model=str(llava), progress=False)).plugin

    class Reusing(torch.nn.Module):
        buffer = torch.zeros(3, 4)

        def embed_images(self, *, pixel_values: Any) -> list[Tensor]:
            return [self.buffer.fill_(float(pixel_values.flatten()[0]))]

    encoder = Encoder(Reusing(), plugin, 4, torch.device("cpu"))
    for value in (1.0, 2.0):
        item = make_item(f"{value:g}", 0, 3, pixel_values=torch.full((1,), value))
        assert encoder.encode([item]) == {}
    assert encoder.features["1"].unique().tolist() == [1.0]


def test_a_row_without_top_p_keeps_its_whole_tail_beside_one_with() -> None:
    peaked = torch.tensor([[30.0, *[0.0] * 7]]).softmax(-1).expand(2, -1)  # a tail of 1e-13 each
    cut = cut_top(peaked, torch.tensor([8, 8]), torch.tensor([[1.0], [0.9]]))
    assert torch.equal(cut[0], peaked[0])
    assert cut[1].nonzero().tolist() == [[0]]


NEEDS_AN_IMAGE = """
    def forward(self, input_ids, *args, **options):
        if len(input_ids) == 1:
            raise ValueError("no text alone")
        return super().forward(input_ids, *args, **options)
"""


@pytest.mark.parametrize("method", ["pass", NEEDS_AN_IMAGE], ids=["sound", "no single tokens"])
def test_a_model_whose_steps_can_not_be_timed_is_served_without_a_pace(
    llava: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    llm = load(llava, tmp_path, method, max_decode_slowdown=2.0)
    can_be_timed = method == "pass"
    assert (llm.engine.scheduler.pace is not None) == can_be_timed
    assert ("Steps can't be timed" in caplog.text) == (not can_be_timed)
    assert ("no text alone" in caplog.text) == (not can_be_timed)
    (answer,) = llm.generate("Hello", SamplingParams(temperature=0.0, max_tokens=1))
    assert answer.error is None
