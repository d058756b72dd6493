"""Whatever a plugin does wrong is a `PluginError` that names it; nothing else gets out."""

from __future__ import annotations

import re
import signal
import sys
import threading
import time
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mm_engine.config import ModelContext
from mm_engine.errors import PluginError, RequestError
from mm_engine.plugins import PlaceholderRange, PromptInputs, blame
from mm_engine.plugins.blame import (
    may_be_the_users,
    num_hanging_calls,
    one_line,
    place_of,
    with_time_limit,
)
from mm_engine.plugins.checks import copy_of, equal_items, fault_of_processed
from mm_engine.plugins.plugin import Plugin
from serving import wait_until

MakePlugin = Callable[..., Plugin]
IMAGE = 3
PICTURE = Image.new("RGB", (4, 4))


def prompt(*ids: int, num_images: int = 1) -> PromptInputs:
    items = tuple({"pixel_values": torch.zeros(3, 2, 2)} for _ in range(num_images))
    return PromptInputs(prompt_token_ids=ids, mapped={"image": items})


def processor(body: str) -> str:
    """An input_processor: `ids` and `ranges` are right until `body` changes them."""
    return f"""
@hookimpl
def input_processor(ctx, inputs):
    right = expand_placeholders(inputs, 3, [4] * len(inputs.mapped["image"]))
    ids, ranges = list(right.prompt_token_ids), list(right.placeholders)
    {body}
    return dataclasses.replace(inputs, prompt_token_ids=tuple(ids), placeholders=tuple(ranges))
"""


def mapper(body: str) -> str:
    return f"""
def map_image(ctx, image):
    {body}
@hookimpl
def register_input_mapper(ctx, register): register("image", map_image)
"""


def test_line_names_distribution_version_hook_place_and_fact(make_plugin: MakePlugin) -> None:
    error = make_plugin().blame("max_tokens", "expected 576, got 575")
    assert str(error) == (
        "mm-test 0.1.0 · max_tokens (mm_test/plugin.py:7): expected 576, got 575."
    )


def test_default_of_a_hook_is_not_blamed_on_the_plugins_code(make_plugin: MakePlugin) -> None:
    line = str(make_plugin().blame("input_processor", "expected 1, got 2"))
    assert "input_processor (mm-engine's default): expected 1, got 2." in line


def test_method_of_the_model_is_blamed_at_its_line(
    make_plugin: MakePlugin, ctx: ModelContext
) -> None:
    plugin = make_plugin(
        "class Model(nn.Module):\n    def embed_images(self): pass\n"
        "@hookimpl\ndef model_class(ctx): return Model"
    )
    assert "· embed_images: too few." in str(plugin.blame("embed_images", "too few"))
    plugin.model_class(ctx)
    assert "· embed_images (mm_test/plugin.py:10): too few." in str(
        plugin.blame("embed_images", "too few")
    )


def test_right_processor_passes_the_checks_that_the_wrong_ones_fail(
    make_plugin: MakePlugin, ctx: ModelContext
) -> None:
    got = make_plugin(processor("pass")).process(ctx, prompt(1, IMAGE, 2, IMAGE, 1, num_images=2))
    assert got.prompt_token_ids == (1, 3, 3, 3, 3, 2, 3, 3, 3, 3, 1)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "expected PromptInputs, got None"),
        ("return ids", "expected PromptInputs, got list"),
        ("return dataclasses.replace(right, prompt_token_ids=ids)", "to be a tuple, got list"),
        ("return dataclasses.replace(right, placeholders=ranges)", "to be a tuple, got list"),
        ("ids[0] = 1.5", "expected token ids, got 1.5"),
        ("ids[0] = -1", "expected token ids, got -1"),
        ("ids[0] = True", "expected token ids, got True"),
        ("ids[1] = torch.tensor(3)", "expected token ids, got Tensor"),
        ("ids[0] = 2", "text unchanged, got token 2 instead of 1 .text token 0."),
        ("ids.append(2)", "expected 3 tokens of text outside of the ranges, got 4"),
        ("ids.pop()", "expected 3 tokens of text outside of the ranges, got 2"),
        ("ids.pop(1)", "expected 3 tokens of text outside of the ranges, got 2"),
        ("ids = list(inputs.prompt_token_ids)", "within 5 tokens, got one that ends at 10"),
        ("ranges.pop()", "expected 2 ranges of modality image, got 1"),
        ("ranges = []", "expected 2 ranges of modality image, got 0"),
        ("ranges.reverse()", "expected ranges in order and apart, got one at 1 after 10"),
        ("ranges[1] = ranges[0]", "expected ranges in order and apart, got one at 1 after 5"),
        ("ranges[1] = 'b'", "expected placeholders to hold PlaceholderRange, got str"),
        ("ranges[0] = PlaceholderRange('image', 0, 1, 0)", "at least 1 placeholder token .*got 0"),
        (
            "ids.insert(1, 3); ranges = [PlaceholderRange('image', 0, 1, 5), "
            "PlaceholderRange('image', 1, 7, 4)]",
            "expected at most 4 placeholder tokens for image 0 .*, got 5",
        ),
        ("ranges[0] = PlaceholderRange('image', 1, 1, 4)", r"numbered 0 to 1, got \[1, 1\]"),
        ("ranges[0] = PlaceholderRange('sound', 0, 1, 4)", "expected ranges for .*'sound'"),
        ("ranges[0] = PlaceholderRange('image', 0, 1.0, 4)", "offset of a range to be an int"),
        ("ranges[0] = PlaceholderRange('image', 0, -1, 4)", "got one at -1 after 0"),
        ("ranges[1] = PlaceholderRange('image', 1, 8, 4)", "got one that ends at 12"),
        (
            "inputs.mapped['image'][0]['pixel_values'][0] += 1",
            "inputs unchanged, got them modified",
        ),
        ("inputs.mapped['image'][1].clear()", "inputs unchanged, got them modified"),
        ("inputs.mapped['image'][0].update(more=torch.ones(1))", "inputs unchanged"),
        ("object.__setattr__(inputs, 'prompt_token_ids', ())", "inputs unchanged"),
        ("raise SystemExit(3)", "raised SystemExit: 3"),
        ("raise ValueError('two\\nlines')", "raised ValueError: two lines"),
        ("{}[0]", "raised KeyError: 0"),
    ],
)
def test_processor_that_breaks_its_contract_is_blamed(
    make_plugin: MakePlugin, ctx: ModelContext, body: str, message: str
) -> None:
    plugin = make_plugin(processor(body))
    with pytest.raises(PluginError, match=message) as error:
        plugin.process(ctx, prompt(1, IMAGE, 2, IMAGE, 1, num_images=2))
    assert str(error.value).startswith("mm-test 0.1.0 · input_processor (mm_test/plugin.py:")
    assert "\n" not in str(error.value)


def test_range_over_text_of_an_unexpanded_prompt_is_blamed(
    make_plugin: MakePlugin, ctx: ModelContext
) -> None:
    plugin = make_plugin(processor("ids = list(inputs.prompt_token_ids)"))
    with pytest.raises(PluginError, match="4 placeholder tokens for image 0, got text among them"):
        plugin.process(ctx, prompt(1, IMAGE, 2, 2, 2, 2))


def test_exception_is_placed_at_the_line_that_raised_and_chained(
    make_plugin: MakePlugin, ctx: ModelContext
) -> None:
    plugin = make_plugin(processor("int('x')"))
    with pytest.raises(PluginError, match=r"mm_test/plugin.py:14\): raised ValueError") as error:
        plugin.process(ctx, prompt(IMAGE))
    assert isinstance(error.value.__cause__, ValueError)


@pytest.mark.parametrize("timeout", [None, 30.0])
def test_request_error_of_a_plugin_is_the_users_fault(
    make_plugin: MakePlugin, ctx: ModelContext, timeout: float | None
) -> None:
    source = mapper("raise RequestError('the picture is too thin', param='messages')")
    with pytest.raises(RequestError, match="^the picture is too thin$"):
        make_plugin(source, timeout=timeout).map_item(ctx, "image", PICTURE)


def test_interrupt_passes_through(make_plugin: MakePlugin, ctx: ModelContext) -> None:
    plugin = make_plugin(processor("raise KeyboardInterrupt"))
    with pytest.raises(KeyboardInterrupt):
        plugin.process(ctx, prompt(IMAGE))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return None", "expected a dict of tensors, got None"),
        ("return torch.zeros(3)", r"expected a dict of tensors, got Tensor \(float32, \[3\]\)"),
        ("return {}", "expected at least one tensor, got an empty dict"),
        ("return {3: torch.zeros(3)}", "expected names that can be keyword arguments, got 3"),
        ("return {'a b': torch.zeros(3)}", "expected names that can be keyword arguments"),
        ("return {'a': [1.0]}", "expected a tensor for a, got list"),
        ("return {'a': torch.zeros(3, device='meta')}", "expected a on the CPU, got it on meta"),
        ("return {'a': torch.eye(3).to_sparse()}", "expected a dense tensor for a"),
        ("return {'a': torch.tensor([float('nan')])}", "expected finite numbers in a"),
        ("return {'a': torch.tensor([1e999])}", "expected finite numbers in a"),
        ("raise SystemExit", "raised SystemExit"),
    ],
)
def test_mapper_that_breaks_its_contract_is_blamed(
    make_plugin: MakePlugin, ctx: ModelContext, body: str, message: str
) -> None:
    plugin = make_plugin(mapper(body))
    with pytest.raises(PluginError, match=message) as error:
        plugin.map_item(ctx, "image", PICTURE)
    assert "mm-test 0.1.0 · register_input_mapper (mm_test/plugin.py:" in str(error.value)


def test_items_must_have_the_same_tensors(make_plugin: MakePlugin, ctx: ModelContext) -> None:
    plugin = make_plugin(mapper("return {f'w{image.width}': torch.zeros(1)}"))
    plugin.map_item(ctx, "image", PICTURE)
    with pytest.raises(PluginError, match=r"the tensors \['w4'\] for each item, got \['w5'\]"):
        plugin.map_item(ctx, "image", Image.new("RGB", (5, 5)))


@pytest.mark.parametrize("hook", ["input_processor", "register_input_mapper"])
def test_hook_that_hangs_fails_at_its_time_limit(
    make_plugin: MakePlugin, ctx: ModelContext, hook: str
) -> None:
    source = "import threading\nEND = threading.Event()\n"
    source += processor("END.wait(120)") + mapper("END.wait(120)")
    plugin = make_plugin(source, timeout=0.5)
    calls: dict[str, Callable[[], object]] = {
        "input_processor": lambda: plugin.process(ctx, prompt(IMAGE)),
        "register_input_mapper": lambda: plugin.map_item(ctx, "image", PICTURE),
    }
    wait_until(lambda: num_hanging_calls() == 0, "calls of other tests to end")
    with pytest.raises(PluginError, match=rf"{hook} \(mm_test/plugin.py:\d+\): took longer than"):
        calls[hook]()
    assert num_hanging_calls() == 1, "nobody waited for it"
    sys.modules["mm_test.plugin"].END.set()
    wait_until(lambda: num_hanging_calls() == 0, "it to end")


def test_time_limit_gives_the_result_and_the_error_of_the_call() -> None:
    assert with_time_limit(lambda: 3, 10, "hook") == 3
    assert with_time_limit(lambda: None, 10, "hook") is None
    with pytest.raises(ZeroDivisionError):
        with_time_limit(lambda: 1 / 0, 10, "hook")
    names = [
        with_time_limit(lambda: threading.current_thread().name, limit, "h") for limit in (None, 9)
    ]
    assert names == [threading.current_thread().name, "hook: h"]


def test_place_of_a_callable_without_source_is_its_name() -> None:
    assert place_of(torch.nn.Identity()) == "torch.nn.modules.linear.Identity"
    assert place_of(Image.open).startswith("PIL/Image.py:")


@given(
    st.lists(st.integers(4, 9), max_size=6),
    st.lists(st.lists(st.just(IMAGE), min_size=1, max_size=4), max_size=4),
    st.randoms(use_true_random=False),
)
def test_any_change_of_one_text_token_is_found(
    text: list[int], runs: list[list[int]], rng: object
) -> None:
    """However text and items are mixed: a right result passes, one changed token doesn't."""
    parts: list[list[int]] = [[token] for token in text] + runs
    rng.shuffle(parts)
    given_ids, ids, ranges = [], [], []
    for part in parts:
        if part[0] == IMAGE:
            ranges.append(PlaceholderRange("image", len(ranges), len(ids), len(part)))
        given_ids.append(part[0])
        ids += part
    given = prompt(*given_ids, num_images=len(runs))
    right = PromptInputs(prompt_token_ids=tuple(ids), placeholders=tuple(ranges))
    assert fault_of_processed(given, right, lambda modality: 4) is None
    for index in (index for index, token in enumerate(ids) if token != IMAGE):
        changed = (*ids[:index], ids[index] + 1, *ids[index + 1 :])
        wrong = PromptInputs(prompt_token_ids=changed, placeholders=tuple(ranges))
        assert "text" in str(fault_of_processed(given, wrong, lambda modality: 4))


def test_no_more_calls_are_made_when_too_many_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each holds a thread for as long as it hangs: without a limit they would use up memory."""
    wait_until(lambda: num_hanging_calls() == 0, "calls of other tests to end")
    monkeypatch.setattr(blame, "MAX_HANGING_CALLS", 3)
    release = threading.Event()
    try:
        for number in range(1, 4):
            with pytest.raises(PluginError, match=r"hook: took longer than 0\.01 s"):
                with_time_limit(release.wait, 0.01, "hook")
            assert num_hanging_calls() == number
        with pytest.raises(PluginError, match="hook: not called, as 3 calls .* Restart the server"):
            with_time_limit(lambda: 1, 10, "hook")
    finally:
        release.set()
    wait_until(lambda: num_hanging_calls() == 0, "the calls to end")
    assert with_time_limit(lambda: 1, 10, "hook") == 1


def test_interrupt_is_the_users_only_where_a_signal_can_raise_it() -> None:
    assert may_be_the_users(KeyboardInterrupt())
    assert not may_be_the_users(SystemExit())
    in_thread: list[bool] = []
    thread = threading.Thread(
        target=lambda: in_thread.append(may_be_the_users(KeyboardInterrupt()))
    )
    thread.start()
    thread.join()
    assert in_thread == [False]
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert not may_be_the_users(KeyboardInterrupt())
    finally:
        signal.signal(signal.SIGINT, before)


def test_interrupt_raised_within_a_time_limit_is_the_plugins(
    make_plugin: MakePlugin, ctx: ModelContext
) -> None:
    plugin = make_plugin(processor("raise KeyboardInterrupt"), timeout=30.0)
    with pytest.raises(PluginError, match="raised KeyboardInterrupt"):
        plugin.process(ctx, prompt(IMAGE))


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "P", "I;16", "F"])
def test_change_of_an_image_is_seen_in_every_mode(mode: str) -> None:
    image = Image.new(mode, (4, 4))
    copy = copy_of(image)
    assert isinstance(copy, Image.Image) and copy is not image
    assert equal_items(copy, image)
    copy.putpixel((3, 3), (0, 0, 1, 0)[: len(mode)] if mode in ("RGB", "RGBA") else 1)
    assert not equal_items(copy, image)
    assert image.getpixel((3, 3)) == Image.new(mode, (1, 1)).getpixel((0, 0))
    for changed in (image.resize((4, 5)), image.convert("1")):
        assert not equal_items(changed, image)


def test_call_that_never_lets_go_of_the_interpreter_fails_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As a regular expression that explodes: nobody can wake up in time, but it doesn't pass."""
    monkeypatch.setattr(blame, "MAX_LATE", 0.2)
    length, seconds = 20, 0.0

    def explode() -> str:
        re.match(r"(a+)+b", "a" * length)
        return "too late"

    while seconds < 1.0:  # of work: far more than the limit and what it may be late by
        length += 1
        start = time.thread_time()  # else a pause of the machine would pass for work
        explode()
        seconds = time.thread_time() - start
    with pytest.raises(PluginError, match=r"hook: took longer than 0\.05 s"):
        with_time_limit(explode, 0.05, "hook")


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("\x1b[31mred\x1b]0;title\x07", r"ValueError: \x1b[31mred\x1b]0;title\x07"),
        ("half \ud800", r"ValueError: half \ud800"),
        ("two\nlines\tand more", "ValueError: two lines and more"),
        ("größer als 字", "ValueError: größer als 字"),
    ],
)
def test_what_a_plugin_says_cannot_hurt_a_terminal(said: str, told: str) -> None:
    assert one_line(ValueError(said)) == told


def test_exception_that_cannot_be_told_is_named() -> None:
    class Odd(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert one_line(Odd()) == "Odd"
