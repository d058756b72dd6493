"""Every wrong plugin: refused at startup, or it costs one request; the message says who and what.

Here the engine runs in the test's process; tests/server has the same over HTTP.
"""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mm_engine import LLM, RequestOutput, SamplingParams
from mm_engine.errors import PluginError, StartupError
from pictures import quarters
from serving import wait_until
from wrong_plugins import (
    MARKED,
    RIGHT,
    STARTUP,
    WIDE,
    WRONG_PLUGINS,
    WrongPlugin,
    end_hanging,
    wrong_at,
)

PARAMS = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
HANG_LIMIT = 3.0  # seconds; well above what a busy machine needs
NEIGHBOURS: tuple[Any, ...] = (
    {"prompt": "<image>What is it?", "multi_modal_data": {"image": quarters(40, 30)}},
    "How many objects are there",
)


@pytest.fixture
def main_thread_has_no_interrupts(request: pytest.FixtureRequest) -> Iterator[None]:
    """As in the engine process: then a KeyboardInterrupt in a plugin's model isn't the user's."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGINT, before)


def load(llava: Path, folder: Path, plugin: WrongPlugin) -> LLM:
    file = plugin.write(folder)
    timeout = HANG_LIMIT if "hangs" in plugin.name else 30.0
    return LLM(str(llava), plugins=(str(file),), hook_timeout=timeout, progress=False)


def assert_blamed(message: str, plugin: WrongPlugin, folder: Path) -> None:
    """The message names plugin, hook, place, and what was expected and got; on one line."""
    file = f"{plugin.name.replace('-', '_')}.py"
    assert "\n" not in message
    assert str(folder) not in message or not plugin.hook
    if plugin.hook:
        head = rf"{file} sha256:\w+ · {plugin.hook} \((\S+\.py:\d+|mm_\S+|mm-engine's default)\): "
        assert re.match(head, message), message
    else:
        assert file in message
    assert re.search(plugin.fact, message), message


@contextmanager
def hanging_ends(folder: Path, name: str) -> Iterator[None]:
    """A plugin's hook that hangs still does when the block is through, and ends then."""

    def num_hooks() -> int:
        head = f"hook: {file.name}"
        return sum(thread.name.startswith(head) for thread in threading.enumerate())

    file = folder / f"{name.replace('-', '_')}.py"
    yield
    assert num_hooks() == ("hangs" in name), "nobody waited for it"
    end_hanging(file)
    wait_until(lambda: num_hooks() == 0, "the hook to end")


@pytest.mark.usefixtures("main_thread_has_no_interrupts")
@pytest.mark.parametrize("name", wrong_at(STARTUP))
def test_plugin_that_is_wrong_from_the_start_is_refused_there(
    llava: Path, tmp_path: Path, name: str
) -> None:
    with hanging_ends(tmp_path, name), pytest.raises((PluginError, StartupError)) as error:
        load(llava, tmp_path, WRONG_PLUGINS[name])
    assert_blamed(str(error.value), WRONG_PLUGINS[name], tmp_path)


def tokens(output: RequestOutput) -> list[int]:
    assert output.error is None, output.error
    return list(output.outputs[0].token_ids)


@pytest.fixture(scope="module")
def expected(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[int]]:
    """What the neighbours are answered by a plugin with no defect."""
    file = tmp_path_factory.mktemp("right") / "right.py"
    file.write_text(RIGHT)
    llm = LLM(str(llava), plugins=(str(file),), progress=False)
    return [tokens(output) for output in llm.generate(NEIGHBOURS, PARAMS)]


def trigger(plugin: WrongPlugin) -> dict[str, Any]:
    """The request that a plugin wrong at runtime fails on; one for the others."""
    image = quarters(64 if plugin.when == WIDE else 40, 30)
    text = "<image>Tell me @" if plugin.when == MARKED else "<image>Tell me"
    return {"prompt": text, "multi_modal_data": {"image": image}}


def held(llm: LLM) -> tuple[int, ...]:
    """What the engine holds for requests, and the threads of hooks of the plugin at work."""
    stats = llm.engine.stats()
    hook = f"hook: {llm.pipeline.plugin.label}"
    hooks = [thread for thread in threading.enumerate() if thread.name.startswith(hook)]
    return stats.num_running, stats.num_waiting, stats.num_used_blocks, len(hooks)


@pytest.mark.usefixtures("main_thread_has_no_interrupts")
@pytest.mark.parametrize("name", wrong_at(WIDE, MARKED))
def test_plugin_that_is_wrong_for_one_request_fails_that_one_only(
    llava: Path, tmp_path: Path, expected: list[list[int]], name: str
) -> None:
    plugin = WRONG_PLUGINS[name]
    llm = load(llava, tmp_path, plugin)
    assert held(llm) == (0, 0, 0, 0)
    prompts = [NEIGHBOURS[0], trigger(plugin), NEIGHBOURS[1]]
    with hanging_ends(tmp_path, name):
        before, failed, after = llm.generate(prompts, PARAMS)
    assert failed.finished and failed.error is not None
    assert failed.error.name == "PluginError"
    assert_blamed(failed.error.message, plugin, tmp_path)
    assert [tokens(before), tokens(after)] == expected
    assert [tokens(output) for output in llm.generate(NEIGHBOURS, PARAMS)] == expected
    wait_until(lambda: held(llm) == (0, 0, 0, 0), f"all given back: {held(llm)}")


@pytest.mark.parametrize("when", [WIDE, MARKED])
def test_request_that_triggers_the_defects_is_served_by_the_right_plugin(
    llava: Path, tmp_path: Path, when: str
) -> None:
    """Else the tests above could pass on a request that no plugin serves."""
    plugin = WrongPlugin("right", RIGHT, "", "", when, "")
    llm = load(llava, tmp_path, plugin)
    assert len(tokens(llm.generate([trigger(plugin)], PARAMS)[0])) == PARAMS.max_tokens


def test_image_that_a_hook_changes_is_a_copy_of_the_callers(llava: Path, tmp_path: Path) -> None:
    for name in ("mapper-paints-the-image-when-wide", "processor-paints-an-image-when-wide"):
        llm = load(llava, tmp_path, WRONG_PLUGINS[name])
        image = quarters(64, 30)
        prompt: Any = {"prompt": "<image>", "multi_modal_data": {"image": image}}
        assert llm.generate(prompt, PARAMS)[0].error is not None
        assert image.tobytes() == quarters(64, 30).tobytes()
        assert isinstance(image, Image.Image)
