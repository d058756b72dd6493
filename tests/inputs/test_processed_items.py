"""A known image isn't mapped again, and nobody can spoil what others are given."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from checkpoints import make_llava
from mm_engine.config import EngineConfig
from mm_engine.errors import PluginError
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.inputs.processed_items import ProcessedItems, Tensors
from mm_engine.request import PromptInputs
from mm_engine.worker.loader import open_model
from parity import picture
from serving import wait_until


def tensors(size: int = 1, value: float = 0.0) -> Tensors:
    return {"x": torch.full((size,), value)}  # 4 bytes each


def test_the_second_time_nothing_is_made() -> None:
    items, made = ProcessedItems(100), list[str]()

    def make() -> Tensors:
        made.append("once")
        return tensors(3, 7.0)

    first, second = items.get("a", make), items.get("a", make)
    assert made == ["once"]
    assert torch.equal(first["x"], second["x"])
    assert (items.num_queries, items.num_hits, items.num_bytes) == (2, 1, 12)


def test_everybody_gets_tensors_of_their_own() -> None:
    items = ProcessedItems(100)
    for _ in range(3):
        given = items.get("a", tensors)
        assert given["x"].item() == 0.0
        given["x"].numpy()[:] = 5.0  # in a way that no version counter sees
        given["y"] = given["x"]
    assert list(items.get("a", tensors)) == ["x"]


def test_nothing_is_kept_with_a_budget_of_zero() -> None:
    items = ProcessedItems(0)
    made = [items.get("a", tensors) for _ in range(2)]
    assert made[0]["x"] is not made[1]["x"]
    assert (items.num_queries, items.num_hits, items.num_bytes) == (0, 0, 0)


@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 12)), max_size=50))
def test_the_least_recently_used_go_when_bytes_run_out(asked: list[tuple[str, int]]) -> None:
    items = ProcessedItems(40)
    sizes: dict[str, int] = {}
    expected: list[tuple[str, int]] = []  # key and bytes, oldest use first
    for key, size in asked:
        number = sizes.setdefault(key, size)
        known = any(key == kept for kept, _ in expected)
        hits = items.num_hits
        assert len(items.get(key, lambda number=number: tensors(number))["x"]) == number
        assert items.num_hits - hits == known
        expected = [pair for pair in expected if pair[0] != key]
        if number * 4 <= 40:
            expected.append((key, number * 4))
        while sum(size for _, size in expected) > 40:
            expected.pop(0)
        assert list(items._kept) == [key for key, _ in expected]
        assert items.num_bytes == sum(size for _, size in expected) <= 40


def test_an_item_that_arrives_while_it_is_mapped_is_waited_for() -> None:
    items, started, go = ProcessedItems(100), threading.Event(), threading.Event()
    made: list[int] = []

    def make() -> Tensors:
        made.append(1)
        started.set()
        assert go.wait(60)
        return tensors(1, 3.0)

    with ThreadPoolExecutor(4) as pool:
        first = pool.submit(items.get, "a", make)
        assert started.wait(60)
        others = [pool.submit(items.get, "a", make) for _ in range(3)]
        wait_until(lambda: items.num_hits == 3, "the others to wait for it")
        go.set()
        answers = [future.result()["x"] for future in (first, *others)]
    assert made == [1]
    assert [answer.item() for answer in answers] == [3.0] * 4
    assert len({answer.data_ptr() for answer in answers}) == 4


def test_failure_is_everybodys_and_is_not_kept() -> None:
    items, started, go = ProcessedItems(100), threading.Event(), threading.Event()

    def fail() -> Tensors:
        started.set()
        assert go.wait(60)
        raise PluginError("broken")

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(items.get, "a", fail)
        assert started.wait(60)
        second = pool.submit(items.get, "a", fail)
        wait_until(lambda: items.num_hits == 1, "the other to wait for it")
        go.set()
        for future in (first, second):
            with pytest.raises(PluginError, match="broken"):
                future.result()
    assert items.get("a", tensors)["x"].item() == 0.0  # tried anew


COUNTING = """
import os
from mm_engine.plugins import hookimpl
from mm_engine.plugins.defaults import map_image
from mm_llava.plugin import max_tokens, model_class

calls = []

@hookimpl
def register_input_mapper(ctx, register):
    register("image", counted)

def counted(ctx, image):
    calls.append(image.size)
    return map_image(ctx, image)
"""


@pytest.fixture
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[InputPipeline, list[Any]]:
    folder = tmp_path_factory.mktemp("counting")
    plugin = folder / "counting.py"
    plugin.write_text(COUNTING)
    path = make_llava(folder / "checkpoint")
    pipeline = InputPipeline(open_model(EngineConfig(model=str(path), plugins=(str(plugin),))))
    import sys

    return pipeline, sys.modules[pipeline.plugin.record.module].calls


def test_mapper_is_called_once_for_each_image(counted: tuple[InputPipeline, list[Any]]) -> None:
    pipeline, calls = counted
    first, second = picture(1), picture(2)

    def prepare(*images: Image.Image, salt: str = "") -> list[torch.Tensor]:
        text = "<image>" * len(images)
        inputs = PromptInputs(prompt=text, multi_modal_data={"image": images})
        items = pipeline.prepare(inputs, cache_salt=salt).items
        return [item.tensors["pixel_values"] for item in items]

    alone = prepare(first)[0], prepare(second)[0]
    assert len(calls) == 2
    again = prepare(second, first, second.copy())
    assert len(calls) == 2
    for got, wanted in zip(again, (alone[1], alone[0], alone[1]), strict=True):
        assert torch.equal(got, wanted)
    # The same bytes in another shape, in another mode, and for another tenant.
    other = Image.frombytes("RGB", first.size[::-1], first.tobytes())
    grey = Image.frombytes("L", (first.width * 3, first.height), first.tobytes())
    for number, (image, salt) in enumerate([(other, ""), (grey, ""), (first, "mine")], start=3):
        prepare(image, salt=salt)
        assert len(calls) == number
