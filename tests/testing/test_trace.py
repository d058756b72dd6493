"""A trace says what the engine is given: the same ids, ranges, tensors and keys."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest
from PIL import Image

from mm_engine.config import EngineConfig
from mm_engine.errors import StartupError
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.llm import LLM
from mm_engine.sampling_params import SamplingParams
from mm_engine.testing.trace import MAX_ROW, TokenRow, Trace, trace
from mm_engine.worker.loader import open_model
from pictures import quarters

QUESTION = "What is in the picture?"
SLOW = 1.0  # seconds; the other hooks take next to nothing

PLUGIN = """
import time
from mm_engine.plugins import *
from mm_llava import plugin as llava

@hookimpl
def model_class(ctx): return llava.model_class(ctx)
@hookimpl
def max_tokens(ctx, modality): return llava.max_tokens(ctx, modality)
@hookimpl
def placeholder_text(ctx, modality, index): return f"[{index}]<image>"
@hookimpl
def input_processor(ctx, inputs):
    {processor}
    counts = [16] * len(inputs.mapped["image"])
    return expand_placeholders(inputs, placeholder_token_id(ctx), counts)
"""


def config_of(model: Path, plugin: Path | None = None) -> EngineConfig:
    plugins = () if plugin is None else (str(plugin),)
    options = {"kv_cache_memory": 2**22, "progress": False, "plugins": plugins}
    return EngineConfig(model=str(model), dtype="float32", device="cpu", **options)


def plugin_file(folder: Path, processor: str = "pass") -> Path:
    path = folder / "traced.py"
    path.write_text(textwrap.dedent(PLUGIN).replace("{processor}", processor))
    return path


def images(number: int = 2) -> list[Image.Image]:
    return [quarters(40 + 10 * index, 30) for index in range(number)]


def ids_of(rows: list[TokenRow]) -> list[int]:
    return [token for row in rows for token in row.token_ids * row.count]


@pytest.fixture(scope="module")
def traced(llava: Path) -> Trace:
    return trace(config_of(llava), QUESTION, images(), run=True)


@pytest.fixture(scope="module")
def pipeline(llava: Path) -> InputPipeline:
    return InputPipeline(open_model(config_of(llava)))


def messages() -> list[dict[str, object]]:
    parts = [{"type": "image", "image": image} for image in images()]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": QUESTION}]}]


def test_rows_are_the_ids_that_the_engine_gets(traced: Trace, pipeline: InputPipeline) -> None:
    text, before = pipeline.chat.encode(messages())
    after = pipeline.prepare_chat(messages()).prompt_token_ids
    assert (traced.prompt, ids_of(traced.before)) == (text, list(before))
    assert ids_of(traced.after) == list(after)
    assert (traced.num_before, traced.num_after) == (len(before), len(after))


def test_rows_know_their_position_and_stay_short(traced: Trace) -> None:
    for rows in (traced.before, traced.after):
        position = 0
        for row in rows:
            assert row.position == position
            assert len(row.token_ids) <= MAX_ROW
            assert row.count == 1 or len(row.token_ids) == 1
            position += len(row.token_ids) * row.count


def test_placeholders_stand_in_rows_of_their_own(traced: Trace) -> None:
    def marked(rows: list[TokenRow]) -> list[tuple[str | None, int, str]]:
        return [(row.item, row.count, row.text) for row in rows if row.item]

    assert marked(traced.before) == [("image 0", 1, "<image>"), ("image 1", 1, "<image>")]
    assert marked(traced.after) == [("image 0", 16, "<image>"), ("image 1", 16, "<image>")]


def test_items_are_those_of_the_request(traced: Trace, pipeline: InputPipeline) -> None:
    expected = pipeline.prepare_chat(messages()).items
    assert len(traced.items) == len(expected) == 2
    for found, item, image in zip(traced.items, expected, images(), strict=True):
        assert (found.width, found.height) == image.size
        assert (found.offset, found.num_tokens) == (item.placeholder.offset, 16)
        assert (found.max_tokens, found.content_key) == (16, item.content_key)
        ((name, dtype, shape),) = [(t.name, t.dtype, t.shape) for t in found.tensors]
        assert (name, dtype, shape) == ("pixel_values", "float32", (3, 32, 32))


def test_first_token_is_the_librarys(traced: Trace, llava: Path) -> None:
    llm = LLM(str(llava), dtype="float32", kv_cache_memory=2**22, progress=False)
    (answer,) = llm.chat(messages(), SamplingParams(temperature=0, max_tokens=1))
    assert traced.run is not None
    assert [traced.run.token_id] == answer.outputs[0].token_ids
    assert (traced.run.num_steps, traced.error) == (1, None)


def test_each_hook_is_told_with_its_place_and_its_calls(traced: Trace) -> None:
    found = {hook.hook: hook for hook in traced.hooks}
    assert list(found) == ["max_tokens", "register_input_mapper", "input_processor", "embed_images"]
    assert found["max_tokens"].place.startswith("mm_llava/plugin.py:")
    assert found["register_input_mapper"].place == "mm-engine's default"
    assert found["embed_images"].place.startswith("mm_llava/model.py:")
    calls = {name: hook.num_calls for name, hook in found.items()}
    assert calls == {
        "max_tokens": 1,  # at startup
        "register_input_mapper": 2,  # one for each image
        "input_processor": 1,
        "embed_images": 1,  # of both together; the profile's own call doesn't count
    }
    assert [name for name, hook in found.items() if hook.again_seconds is not None] == [
        "register_input_mapper",
        "input_processor",
    ]


def test_seconds_are_those_of_the_hook(llava: Path, tmp_path: Path) -> None:
    plugin = plugin_file(tmp_path, f"time.sleep({SLOW})")
    start = time.perf_counter()
    found = trace(config_of(llava, plugin), QUESTION, images(1))
    most = time.perf_counter() - start
    hooks = {hook.hook: hook for hook in found.hooks}
    slow, others = hooks.pop("input_processor"), hooks
    assert SLOW <= slow.first_seconds < most
    assert slow.again_seconds is not None and SLOW <= slow.again_seconds < most
    assert slow.place.startswith("mm_engine_file_traced.py:") or "traced.py:" in slow.place
    assert "placeholder_text" in others
    assert others["max_tokens"].first_seconds < slow.first_seconds


def test_long_prompt_takes_several_steps_to_its_first_token(llava: Path) -> None:
    config = EngineConfig(
        model=str(llava),
        dtype="float32",
        device="cpu",
        max_num_batched_tokens=16,
        kv_cache_memory=2**22,
        progress=False,
    )
    found = trace(config, QUESTION, images(), run=True)
    assert found.run is not None
    assert found.run.num_steps == -(-found.num_after // 16)


def test_hook_that_fails_ends_the_trace_and_shows_where_it_came_to(
    llava: Path, tmp_path: Path
) -> None:
    plugin = plugin_file(tmp_path, "raise KeyError('lost')")
    found = trace(config_of(llava, plugin), QUESTION, images(1), run=True)
    assert found.error is not None and "input_processor (" in found.error
    assert "raised KeyError: 'lost'" in found.error
    assert found.num_before > 0 and [row.item for row in found.before if row.item] == ["image 0"]
    assert (found.after, found.items, found.run) == ([], [], None)
    called = {hook.hook for hook in found.hooks}
    assert {"register_input_mapper", "input_processor"} <= called


def test_without_a_chat_template_the_placeholder_texts_stand_before_the_question(
    llava: Path, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in llava.iterdir():
        if file.name != "chat_template.jinja":
            (model / file.name).symlink_to(file)
    found = trace(config_of(model, plugin_file(tmp_path)), QUESTION, images())
    assert found.prompt == f"[0]<image>\n[1]<image>\n{QUESTION}"
    assert [item.num_tokens for item in found.items] == [16, 16]
    assert found.error is None


def test_text_alone_has_no_items(llava: Path) -> None:
    found = trace(config_of(llava), QUESTION, [])
    assert (found.items, found.error) == ([], None)
    assert ids_of(found.before) == ids_of(found.after)


def test_model_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StartupError):
        trace(config_of(tmp_path / "nothing"), QUESTION, [])
