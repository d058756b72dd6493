"""Tokens equal transformers' in float32 for images of any size, cut into tiles by their shape."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoints import BACKBONES, TOWERS, make_llava_next
from mm_engine import LLM, SamplingParams
from mm_engine.outputs import RequestOutput
from mm_engine.worker.encoder import batch
from parity import Case, Oracle, Trace, picture
from test_parity import CACHES, OPTIONS, is_cached

NUM_SIZES = 52  # in each of four geometries: 208
NUM_TOKENS = 8
LONGEST = 4000  # pixels
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
CORNERS = ((1, 1), (1, LONGEST), (LONGEST, 1), (LONGEST, LONGEST), (2, 3), (LONGEST, 1500))
ROUNDED = ((704, 396), (752, 423), (656, 205), (423, 94), (840, 700))  # floats just below a whole

#: One head for keys and values: prompts have thousands of tokens.
SMALL_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": False,  # random ones would repeat the last token for ever
}
#: Narrow, but with the patch grids of the real ones: 24 x 24 and 27 x 27.
SMALL_TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
    "patch_size": 14,
}
BYTES_PER_TOKEN = 2 * 16 * 2 * 4  # keys and values, 16 wide, of two layers, in float32


@dataclass(frozen=True)
class Geometry:
    """A tower's picture in pixels, the pinpoints in tiles (None: as published), the backbone."""

    tower: str
    side: int
    grids: tuple[tuple[int, int], ...] | None
    backbone: str
    feature_layer: int | list[int] = -2

    @property
    def name(self) -> str:
        """As the tests are called."""
        return f"{self.side}-14-{'default' if self.grids is None else 'custom'}-{self.backbone}"

    def make(self, path: Path) -> Path:
        """A checkpoint of it."""
        sides = [[rows * self.side, columns * self.side] for rows, columns in self.grids or ()]
        window = {"sliding_window": 1000} if self.backbone == "mistral" else {}
        return make_llava_next(
            path,
            tower=self.tower,
            backbone=self.backbone,
            feature_layer=self.feature_layer,
            pinpoints=sides or None,
            text_changes={**SMALL_TEXT, **window},
            vision_changes={**SMALL_TOWER, "image_size": self.side},
        )


GEOMETRIES = (
    Geometry("clip", 336, None, "llama"),
    Geometry("clip", 336, ((1, 1), (2, 3), (1, 4), (5, 1)), "mistral", [-2, -1]),
    Geometry("siglip", 384, None, "qwen2", -1),
    Geometry("siglip", 384, ((2, 1), (1, 6), (2, 3), (1, 1)), "llama", [0, -2]),
)


@dataclass
class Fixture:
    """A checkpoint, prompts with images of random sizes, and what transformers makes of them."""

    path: Path
    oracle: Oracle
    cases: list[Case]
    features: list[torch.Tensor]
    prompt_ids: list[list[int]]
    answers: list[list[int]]

    def llm(self, **options: Any) -> LLM:
        """The checkpoint in float32."""
        return LLM(str(self.path), dtype="float32", progress=False, **options)

    def run(self, llm: LLM) -> None:
        """All answers are the oracle's."""
        outputs = llm.generate([case.as_prompt() for case in self.cases], GREEDY)
        for i, output in enumerate(outputs):
            assert output.error is None
            assert output.prompt_token_ids == self.prompt_ids[i], self.cases[i].images[0].size
            self.oracle.check(self.cases[i], self.answers[i], output.outputs[0].token_ids)


def random_sizes(seed: int) -> list[tuple[int, int]]:
    """Widths and heights of every order of magnitude, corners and rounded ones first."""
    rng = random.Random(seed)
    others = NUM_SIZES - len(CORNERS + ROUNDED)
    sides = [
        (round(LONGEST ** rng.random()), round(LONGEST ** rng.random())) for _ in range(others)
    ]
    return [*CORNERS, *ROUNDED, *sides]


@pytest.fixture(scope="module", params=GEOMETRIES, ids=lambda geometry: geometry.name)
def fixture(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fixture:
    geometry: Geometry = request.param
    path = geometry.make(tmp_path_factory.mktemp("checkpoint"))
    oracle = Oracle(path)
    cases = [
        # They begin differently: where text before an image is shared, prompts wait for images
        # before they are admitted, and blocks don't run out.
        Case(f"{i % 10}{i} USER: <image>\nWhat is in it? ASSISTANT:", (picture(i, *size),))
        for i, size in enumerate(random_sizes(GEOMETRIES.index(geometry)))
    ]
    features = [oracle.features(case.images)[0] for case in cases]
    prompt_ids = [
        oracle.expanded(case, [len(rows)]) for case, rows in zip(cases, features, strict=True)
    ]
    answers = [
        oracle.answer(case, NUM_TOKENS, ids) for case, ids in zip(cases, prompt_ids, strict=True)
    ]
    assert len({tuple(answer) for answer in answers}) > NUM_SIZES // 4, "answers must vary"
    return Fixture(path, oracle, cases, features, prompt_ids, answers)


def test_features_of_every_size(fixture: Fixture) -> None:
    llm = fixture.llm()
    model: Any = llm.engine.runner._runner.model  # type: ignore[attr-defined]
    plugin, ctx = llm.pipeline.plugin, llm.pipeline.ctx
    for start in range(0, NUM_SIZES, 4):  # as the engine does: those of a step together
        cases = fixture.cases[start : start + 4]
        mapped = [plugin.map_item(ctx, "image", case.images[0]) for case in cases]
        tensors = {name: batch([item[name] for item in mapped]) for name in mapped[0]}
        with torch.inference_mode():
            got = model.embed_images(**tensors)
        for expected, rows in zip(fixture.features[start : start + 4], got, strict=True):
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("caches", CACHES)
def test_all_sizes_mixed_in_one_batch(fixture: Fixture, caches: str) -> None:
    llm = fixture.llm(**CACHES[caches])
    trace = Trace.of(llm)
    fixture.run(llm)
    assert trace.most_sequences > 16
    assert trace.mixed_steps > 0
    assert llm.engine.stats().num_preemptions == 0


@pytest.mark.parametrize("caches", [*CACHES, "cached-drafts"])
def test_chunks_that_cut_images_while_blocks_run_out(fixture: Fixture, caches: str) -> None:
    longest = max(len(ids) for ids in fixture.prompt_ids)
    memory = (longest + NUM_TOKENS + 2) * BYTES_PER_TOKEN
    options = {"max_num_batched_tokens": 1500, "block_size": 2, **OPTIONS[caches]}
    llm = fixture.llm(kv_cache_memory=memory, **options)
    trace = Trace.of(llm)
    fixture.run(llm)
    assert trace.cut_images > 8
    assert max(step.num_tokens for step in trace.steps) <= 1500
    stats = llm.engine.stats()
    # Short answers that come in fewer steps may all fit. test_parity_drafts.py has both at once.
    assert stats.num_preemptions > 0 or "drafts" in caches
    assert stats.num_used_blocks == 0
    assert (llm.engine.kv_cache.num_evictions > 0) == is_cached(caches)
    assert (stats.num_drafts > 0) == ("drafts" in caches)  # answers are short: all may be right


IMAGES = tuple(
    picture(i, *size) for i, size in enumerate([(40, 32), (90, 20), (7, 80), (200, 190)])
)
SEVERAL = (
    Case("Hello there, what is in the"),
    Case("<image>", IMAGES[1:2]),
    Case("a <image> b <image><image> c: which is left of which? ASSISTANT:", IMAGES[:3]),
    Case("USER: <image>\n<image>\nWhat differs? ASSISTANT:", IMAGES[2:]),
)
LAYERS: tuple[int | list[int], ...] = (-2, [-3, -1])


@pytest.mark.parametrize(
    ("backbone", "tower", "layer"), list(product(BACKBONES, TOWERS, LAYERS)), ids=str
)
def test_several_images_in_a_prompt(
    backbone: str, tower: str, layer: int | list[int], tmp_path: Path
) -> None:
    path = make_llava_next(tmp_path, backbone=backbone, tower=tower, feature_layer=layer)
    oracle = Oracle(path)
    prompts = [case.as_prompt() for case in SEVERAL]
    params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
    answers = [oracle.answer(case, 24) for case in SEVERAL]
    chunks: dict[str, Any] = {"max_num_batched_tokens": 11, "block_size": 4}
    for caches, options in (("cached", {}), ("cached", chunks), ("cached-drafts", chunks)):
        llm = LLM(str(path), dtype="float32", progress=False, **options, **OPTIONS[caches])
        outputs: list[RequestOutput] = llm.generate(prompts, params)
        assert (llm.engine.stats().num_drafts > 0) == ("drafts" in caches)
        for case, answer, output in zip(SEVERAL, answers, outputs, strict=True):
            assert output.prompt_token_ids == oracle.expanded_ids(case)
            oracle.check(case, answer, output.outputs[0].token_ids)
