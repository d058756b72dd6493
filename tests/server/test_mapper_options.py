"""`mm_processor_kwargs`: only what the operator allowed, and within bounds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from mm_engine.config import EngineConfig
from mm_engine.errors import EngineDead, PluginError, RequestError, StartupError
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.plugins.discovery import demos
from mm_engine.server import mapper_options
from mm_engine.server.chat import with_prepared
from mm_engine.server.mapper_options import blame, check_allowed, check_options
from mm_engine.server.protocol import ChatRequest, parse
from mm_engine.server.settings import ServerSettings
from mm_engine.worker.loader import open_model
from pictures import data_url, encode, quarters
from serving import FLAGS, ServerProcess, wait_until

CHAT = "/v1/chat/completions"
DEMO = min(demos().items())[1]


@pytest.fixture(scope="module")
def allowing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    names = ("crop_size", "do_normalize", "image_mean", "size")
    flags = [part for name in names for part in ("--allowed-mm-processor-kwargs", name)]
    with ServerProcess(tmp_path_factory.mktemp("allowing"), *FLAGS, *flags) as started:
        yield started


def ask(server: ServerProcess, **options: Any) -> Any:
    image = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(64, 64)))}}
    body = {
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}],
        "max_tokens": 1,
        "logprobs": True,
        "top_logprobs": 5,
        "temperature": 0.0,
    }
    return server.http.post(CHAT, json=body | options)


def logprobs(answer: Any) -> Any:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["logprobs"]


def test_an_allowed_option_changes_what_the_model_sees(allowing: ServerProcess) -> None:
    plain = logprobs(ask(allowing))
    other = logprobs(ask(allowing, mm_processor_kwargs={"do_normalize": False}))
    assert other != plain  # and the processed image of before isn't taken for it
    assert logprobs(ask(allowing, mm_processor_kwargs={})) == plain
    assert logprobs(ask(allowing, mm_processor_kwargs={"do_normalize": False})) == other


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"do_resize": False}, "doesn't let clients set. It lets them set crop_size, do_normalize"),
        ({"image_mean": [0.5] * 65}, "out of range"),
        ({"image_mean": "x" * 65}, "out of range"),
        ({"size": {"height": 100_000, "width": 8}}, "out of range"),
        ({"image_mean": "nonsense"}, "can't take these options"),
        ({"image_mean": {"a": [1]}}, "can't take these options"),
    ],
)
def test_others_are_refused(allowing: ServerProcess, options: dict[str, Any], part: str) -> None:
    answer = ask(allowing, mm_processor_kwargs=options)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "mm_processor_kwargs"), error
    assert part in error["message"]
    assert allowing.http.get("/health").status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_model_cant_take_is_the_clients_fault(
    allowing: ServerProcess, stream: bool
) -> None:
    """It is the vision tower that says so; without options it would be the plugin's fault."""
    size = {"height": 20, "width": 20}
    answer = ask(allowing, mm_processor_kwargs={"crop_size": size}, stream=stream)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "mm_processor_kwargs"), error
    assert "the model fails on images as these options make them: mm-llava " in error["message"]
    assert "Change or leave out mm_processor_kwargs." in error["message"]
    logprobs(ask(allowing))


FAILING = """
from mm_engine.plugins import hookimpl, image_processor
from mm_llava.plugin import max_tokens, model_class


@hookimpl
def register_input_mapper(ctx, register):
    register("image", mapper)


def mapper(ctx, image, options=None):
    if image.width == 64:
        raise KeyError("s3cr3t")
    processed = image_processor(ctx)(images=image, return_tensors="pt")
    return {"pixel_values": processed["pixel_values"][0]}
"""


def test_a_hook_that_fails_is_blamed_on_options_only_if_they_made_an_image(
    tmp_path: Path,
) -> None:
    """What its exception says is for nobody, and the log has where it was either way."""
    file = tmp_path / "failing.py"
    file.write_text(FAILING)
    flags = (*FLAGS, "--plugin", str(file), "--allowed-mm-processor-kwargs", "level")
    with ServerProcess(tmp_path, *flags) as server:
        with_options = ask(server, mm_processor_kwargs={"level": 1})
        without = ask(server)
        told = with_options.json()["error"]
        assert (with_options.status_code, told["param"]) == (400, "mm_processor_kwargs")
        assert (without.status_code, without.json()["error"]["type"]) == (500, "plugin_error")
        assert "failing.py" in told["message"] and "raised KeyError. Change" in told["message"]
        wait_until(lambda: "With mm_processor_kwargs of a request: " in server.output, "its line")
        assert "s3cr3t" not in with_options.text + without.text + server.output


def test_what_nobody_asked_for_stays_the_plugins_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    broken = PluginError("mm-x 1.0: raised ValueError.")
    assert blame(None, broken) is blame({}, broken) is broken
    dead = EngineDead("the engine has stopped.")
    assert blame({"size": 1}, dead) is dead
    assert isinstance(blame({"size": 1}, broken), RequestError)
    monkeypatch.setattr(mapper_options, "no_more_calls", lambda: True)
    assert blame({"size": 1}, broken) is broken  # a hook isn't even called


@pytest.mark.parametrize("with_image", [False, True])
def test_options_are_blamed_only_for_images(with_image: bool) -> None:
    """A template may fail, too; what its error came from stays known."""
    broken, cause = PluginError("mm-x 1.0: raised ValueError."), ValueError()
    broken.__cause__ = cause

    async def with_images(sources: Any, work: Any) -> Any:
        raise broken

    settings = ServerSettings(served_model_names=("x",), allowed_mm_processor_kwargs=("size",))
    service: Any = SimpleNamespace(settings=settings, with_images=with_images)
    image = {"type": "image_url", "image_url": {"url": data_url(encode(quarters(8, 8)))}}
    content = [{"type": "text", "text": "x"}, *([image] if with_image else [])]
    body = {
        "messages": [{"role": "user", "content": content}],
        "mm_processor_kwargs": {"size": 8},
    }
    asked = parse(ChatRequest, json.dumps(body).encode())
    with pytest.raises(RequestError if with_image else PluginError) as raised:
        asyncio.run(with_prepared(service, asked, lambda prepared: prepared))
    assert raised.value.__cause__ is (broken if with_image else cause)


def test_by_default_none_is_allowed(server: ServerProcess) -> None:
    answer = ask(server, mm_processor_kwargs={"do_normalize": False})
    assert answer.status_code == 400 and "set none" in answer.json()["error"]["message"]


def test_a_flag_for_an_option_that_isnt_there_is_refused_at_startup() -> None:
    check_allowed(("a",), ("a", "b"))
    check_allowed(("a",), None)
    with pytest.raises(StartupError, match="doesn't have: c. It has a, b"):
        check_allowed(("a", "c"), ("a", "b"))


def test_pixels_may_be_more_than_sides() -> None:
    check_options({"max_pixels": 2**24}, ("max_pixels",))
    check_options({"side": 4096}, ("side",))
    for options in ({"max_pixels": 2**25}, {"side": 4097}, {"side": float("nan")}):
        with pytest.raises(RequestError, match="out of range"):
            check_options(options, ("max_pixels", "side"))


MAPPER = """
import torch
from mm_engine.plugins import hookimpl
from mm_llava.plugin import max_tokens, model_class


@hookimpl
def register_input_mapper(ctx, register):
    register("image", mapper)


def mapper(ctx, image{parameters}):
    return {{"pixel_values": torch.full((3, 4, 4), {value})}}
"""


def pipeline(folder: Path, parameters: str, value: str) -> InputPipeline:
    file = folder / "own_mapper.py"
    file.write_text(MAPPER.format(parameters=parameters, value=value))
    config = EngineConfig(model=str(DEMO), plugins=(str(file),), progress=False)
    return InputPipeline(open_model(config))


def prepare(made: InputPipeline, options: dict[str, Any]) -> torch.Tensor:
    content = [{"type": "image", "image": Image.new("RGB", (8, 8))}]
    prepared = made.prepare_chat(
        [{"role": "user", "content": content}], mm_processor_kwargs=options
    )
    return prepared.items[0].tensors["pixel_values"]


def test_a_plugins_own_mapper_gets_them_if_it_takes_any(tmp_path: Path) -> None:
    takes = pipeline(tmp_path, ", options=None", '(options or {}).get("level", 0.25)')
    assert prepare(takes, {}).unique().tolist() == [0.25]
    assert prepare(takes, {"level": 0.5}).unique().tolist() == [0.5]
    assert takes.plugin.option_names(takes.ctx, "image") is None
    (tmp_path / "other").mkdir()
    takes_none = pipeline(tmp_path / "other", "", "0.25")
    assert prepare(takes_none, {}).unique().tolist() == [0.25]
    with pytest.raises(RequestError, match="It has none"):
        prepare(takes_none, {"level": 0.5})


def test_the_default_mapper_gives_what_transformers_gives(tmp_path: Path) -> None:
    made = InputPipeline(open_model(EngineConfig(model=str(DEMO), progress=False)))
    image = quarters(64, 64)
    processor = AutoImageProcessor.from_pretrained(DEMO)
    expected = processor(images=image, return_tensors="pt", do_normalize=False)["pixel_values"][0]
    content = [{"type": "image", "image": image}]
    prepared = made.prepare_chat(
        [{"role": "user", "content": content}], mm_processor_kwargs={"do_normalize": False}
    )
    assert torch.equal(prepared.items[0].tensors["pixel_values"], expected)
    assert {"do_normalize", "size"} <= (made.plugin.option_names(made.ctx, "image") or set())
