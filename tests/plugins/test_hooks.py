"""Each hook: what it gets, what its result must be, what happens without it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mm_engine.config import ModelContext
from mm_engine.errors import PluginError, RequestError
from mm_engine.plugins import PromptInputs, hookspecs
from mm_engine.plugins.plugin import Plugin
from mm_engine.plugins.registration import REQUIRED, hook_names

MakePlugin = Callable[..., Plugin]
IMAGE = 3


def prompt(*ids: int, num_images: int = 0) -> PromptInputs:
    items = tuple({"pixel_values": torch.zeros(3, 2, 2)} for _ in range(num_images))
    return PromptInputs(prompt_token_ids=ids, mapped={"image": items})


@pytest.mark.parametrize("name", hook_names())
def test_every_hook_has_a_test(name: str) -> None:
    assert f"test_hook_{name}" in globals()


@pytest.mark.parametrize("name", hook_names())
def test_every_hook_is_documented_with_its_exact_signature(name: str) -> None:
    page = (Path(__file__).parents[2] / "docs" / "reference" / "hooks.md").read_text("utf-8")
    function = getattr(hookspecs, name)
    signature = inspect.signature(function)
    arguments = [f"{p.name}: {p.annotation}" for p in signature.parameters.values()]
    written = f"def {name}({', '.join(arguments)}) -> {signature.return_annotation}: ..."
    assert f"```python\n@hookimpl\n{written}\n```" in page
    assert inspect.getdoc(function) in page
    assert f"## `{name}`" + (" (required)" if name in REQUIRED else "") + "\n" in page


def test_hook_model_class(make_plugin: MakePlugin, ctx: ModelContext) -> None:
    assert make_plugin().model_class(ctx) is torch.nn.Identity


@pytest.mark.parametrize(
    ("result", "got"), [("nn.Identity()", "Identity"), ("int", "the class int"), ("None", "None")]
)
def test_model_class_that_is_no_module_is_refused(
    make_plugin: MakePlugin, ctx: ModelContext, result: str, got: str
) -> None:
    plugin = make_plugin(f"@hookimpl\ndef model_class(ctx): return {result}")
    with pytest.raises(PluginError, match=rf"subclass of torch.nn.Module, got {got}\.$"):
        plugin.model_class(ctx)


def test_hook_max_tokens(make_plugin: MakePlugin, ctx: ModelContext) -> None:
    plugin = make_plugin(
        """
        calls = []
        @hookimpl
        def max_tokens(ctx, modality):
            calls.append(modality)
            return ctx.max_model_len + len(calls)
        """
    )
    assert plugin.max_tokens(ctx, "image") == 65
    assert plugin.max_tokens(ctx, "image") == 65  # asked once
    assert plugin.max_tokens(ctx, "video") == 66


@pytest.mark.parametrize("result", ["0", "-1", "True", "4.0", "None", "'4'", "torch.tensor(4)"])
def test_max_tokens_must_be_a_positive_int(
    make_plugin: MakePlugin, ctx: ModelContext, result: str
) -> None:
    plugin = make_plugin(f"@hookimpl\ndef max_tokens(ctx, modality): return {result}")
    with pytest.raises(PluginError, match=r"max_tokens \(mm_test/plugin.py:9\): expected an int"):
        plugin.max_tokens(ctx, "image")


def test_hook_register_input_mapper(make_plugin: MakePlugin, ctx: ModelContext) -> None:
    plugin = make_plugin(
        """
        @hookimpl
        def register_input_mapper(ctx, register):
            register("image", lambda ctx, item: {"pixels": torch.full((2,), float(item.width))})
        """
    )
    image = Image.new("RGB", (5, 7))
    assert plugin.map_item(ctx, "image", image)["pixels"].tolist() == [5.0, 5.0]
    assert "register_input_mapper.<locals>.<lambda> mm_test/plugin.py:12" in plugin.mapper_key(
        ctx, "image"
    )
    with pytest.raises(PluginError, match="expected a mapper for modality video, got none"):
        plugin.map_item(ctx, "video", image)


@pytest.mark.parametrize("arguments", ["'image', 3", "3, print"])
def test_registering_nonsense_is_refused(
    make_plugin: MakePlugin, ctx: ModelContext, arguments: str
) -> None:
    plugin = make_plugin(
        f"@hookimpl\ndef register_input_mapper(ctx, register): register({arguments})"
    )
    with pytest.raises(PluginError, match=r"expected register\(str, function\), got register"):
        plugin.mapper_key(ctx, "image")


def test_hook_input_processor(make_plugin: MakePlugin, ctx: ModelContext) -> None:
    plugin = make_plugin(
        """
        @hookimpl
        def input_processor(ctx, inputs):
            return expand_placeholders(inputs, placeholder_token_id(ctx), [2, 3])
        """
    )
    got = plugin.process(ctx, prompt(1, IMAGE, 2, IMAGE, num_images=2))
    assert got.prompt_token_ids == (1, 3, 3, 2, 3, 3, 3)
    assert [(place.offset, place.length) for place in got.placeholders] == [(1, 2), (4, 3)]


def test_prompt_without_items_needs_no_processor(
    make_plugin: MakePlugin, ctx: ModelContext
) -> None:
    plugin = make_plugin("@hookimpl\ndef input_processor(ctx, inputs): raise SystemExit")
    assert plugin.process(ctx, prompt(1, 2)).prompt_token_ids == (1, 2)
    with pytest.raises(RequestError, match="1 placeholder for 0 images"):
        plugin.process(ctx, prompt(1, IMAGE))


def test_without_an_input_processor_each_image_takes_max_tokens(
    make_plugin: MakePlugin, ctx: ModelContext
) -> None:
    got = make_plugin().process(ctx, prompt(1, IMAGE, 2, num_images=1))
    assert got.prompt_token_ids == (1, 3, 3, 3, 3, 2)
    assert got.placeholders[0].length == 4


def test_hook_dummy_data(make_plugin: MakePlugin, ctx: ModelContext) -> None:
    plugin = make_plugin(
        """
        @hookimpl
        def dummy_data(ctx, seq_len, counts):
            return PromptInputs(prompt="a " * seq_len, multi_modal_data={"image": counts["image"]})
        """
    )
    got = plugin.dummy_data(ctx, 3, {"image": 2})
    assert (got.prompt, got.multi_modal_data["image"]) == ("a a a ", 2)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("None", "expected PromptInputs, got None"),
        ("'text'", "expected PromptInputs, got str"),
        ("PromptInputs()", "either prompt or prompt_token_ids"),
        ("PromptInputs(prompt='a', prompt_token_ids=(1,))", "either prompt or prompt_token_ids"),
    ],
)
def test_dummy_data_must_be_one_raw_prompt(
    make_plugin: MakePlugin, ctx: ModelContext, result: str, message: str
) -> None:
    plugin = make_plugin(f"@hookimpl\ndef dummy_data(ctx, seq_len, counts): return {result}")
    with pytest.raises(PluginError, match=message):
        plugin.dummy_data(ctx, 3, {})


def test_hook_placeholder_text(make_plugin: MakePlugin, ctx: ModelContext) -> None:
    plugin = make_plugin(
        """
        @hookimpl
        def placeholder_text(ctx, modality, index): return f"{'a ' * index}<image>"
        """
    )
    assert plugin.placeholder_text(ctx, "image", 0) == "<image>"
    assert plugin.placeholder_text(ctx, "image", 2) == "a a <image>"


@pytest.mark.parametrize("result", ["None", "''", "3", "'a'", "'<image> <image>'"])
def test_placeholder_text_must_hold_the_placeholder_once(
    make_plugin: MakePlugin, ctx: ModelContext, result: str
) -> None:
    plugin = make_plugin(f"@hookimpl\ndef placeholder_text(ctx): return {result}")
    with pytest.raises(PluginError, match=r"placeholder_text \(mm_test/plugin.py:9\): expected a"):
        plugin.placeholder_text(ctx, "image", 0)


def test_without_placeholder_text_it_is_the_image_token(
    make_plugin: MakePlugin, ctx: ModelContext
) -> None:
    assert make_plugin().placeholder_text(ctx, "image", 5) == "<image>"


def test_another_context_is_asked_about_anew(make_plugin: MakePlugin, ctx: ModelContext) -> None:
    plugin = make_plugin("@hookimpl\ndef max_tokens(ctx, modality): return ctx.max_model_len")
    assert plugin.max_tokens(ctx, "image") == 64
    assert plugin.max_tokens(dataclasses.replace(ctx, max_model_len=9), "image") == 9
