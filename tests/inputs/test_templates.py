"""Which chat template is taken, and what comes of one that is broken."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints import CHAT_TEMPLATE, SPECIAL, make_tokenizer
from mm_engine.config import EngineConfig
from mm_engine.errors import RequestError, StartupError
from mm_engine.inputs.pipeline import InputPipeline
from mm_engine.worker.loader import open_model
from tokenizing import tokenizer_of

HELLO = [{"role": "user", "content": "hello"}]
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
#: As LLaVA-1.5's checkpoints on the Hub have it: images first, whatever order they came in.
HUB = (
    "{% for message in messages %}{% if message['role'] != 'system' %}"
    "{{ message['role'].upper() + ': '}}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
    "{{ '<image>\n' }}{% endfor %}{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{{ content['text'] + ' '}}{% endfor %}{% else %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' '}}{% endgeneration %}{% endfor %}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
BOS_ID, IMAGE_ID = SPECIAL.index("<s>"), SPECIAL.index("<image>")


def open_pipeline(path: Path, chat_template: str | None = None) -> InputPipeline:
    return InputPipeline(open_model(EngineConfig(model=str(path))), chat_template=chat_template)


@pytest.fixture
def text_only(copy: Path) -> Path:
    """A checkpoint whose tokenizer brings the text backbone's own template, without images."""
    (copy / "chat_template.jinja").unlink()
    file = copy / "tokenizer_config.json"
    template = BARE + "from the tokenizer"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))
    assert open_pipeline(copy).chat.encode(HELLO)[0] == "hellofrom the tokenizer"
    return copy


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_the_processors_template_comes_before_the_tokenizers(text_only: Path, name: str) -> None:
    is_json = name.endswith("json")
    content = json.dumps({"chat_template": CHAT_TEMPLATE}) if is_json else CHAT_TEMPLATE
    (text_only / name).write_text(content)
    assert open_pipeline(text_only).chat.encode(HELLO)[0] == "<s>USER: hello ASSISTANT:"


def test_the_new_file_comes_before_the_legacy_one(text_only: Path) -> None:
    (text_only / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (text_only / "chat_template.json").write_text(json.dumps({"chat_template": BARE}))
    assert open_pipeline(text_only).chat.encode(HELLO)[0] == "<s>USER: hello ASSISTANT:"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"template": "x"}', "\x00\xff"])
def test_a_broken_legacy_file_is_named(text_only: Path, content: str) -> None:
    file = text_only / "chat_template.json"
    file.write_bytes(content.encode("latin-1"))
    with pytest.raises(StartupError, match="chat template can't be read: .*chat_template.json"):
        open_pipeline(text_only)


def test_a_template_file_that_is_no_text_is_named(checkpoint: Path, tmp_path: Path) -> None:
    file = tmp_path / "template.jinja"
    file.write_bytes(b"\xff\xfe{{")
    with pytest.raises(StartupError, match=r"can't be read: .*template\.jinja \(UnicodeDecode"):
        open_pipeline(checkpoint, str(file))


def test_invalid_jinja_is_said_at_startup(checkpoint: Path) -> None:
    with pytest.raises(StartupError, match=r"not valid Jinja: .* \(line 2\)"):
        open_pipeline(checkpoint, "{{ messages }}\n{% if %}")


def test_invalid_jinja_of_a_request_is_its_own_fault(pipeline: InputPipeline) -> None:
    with pytest.raises(RequestError, match="not valid Jinja"):
        pipeline.prepare_chat(HELLO, chat_template="{% for %}")


@pytest.mark.parametrize("template", ["{{ 1 / 0 }}", "{{ messages.x.y }}", "{{ none() }}"])
def test_whatever_a_template_raises_the_request_is_refused(checkpoint: Path, template: str) -> None:
    pipeline = open_pipeline(checkpoint, template)
    with pytest.raises(RequestError, match="the chat template refuses these messages"):
        pipeline.prepare_chat(HELLO)


@pytest.mark.parametrize("kind", ["bytes", "metaspace"])
@pytest.mark.parametrize("typed", ["x</s>y", "a <image> b", "<image>", "</s></s>", "é<s>"])
def test_a_typed_special_token_decodes_to_just_what_was_typed(
    open_with: Callable[..., InputPipeline], kind: str, typed: str
) -> None:
    pipeline = open_with(tokenizer_of(kind))
    rendered, ids = pipeline.chat.encode([{"role": "user", "content": typed}])
    assert pipeline.ctx.tokenizer.decode(list(ids)) == rendered
    assert IMAGE_ID not in ids


def test_a_bos_that_the_user_typed_begins_no_prompt(
    open_with: Callable[..., InputPipeline],
) -> None:
    pipeline = open_with(make_tokenizer(), chat_template=BARE)
    _, ids = pipeline.chat.encode([{"role": "user", "content": "<s>hello"}])
    assert ids[0] == BOS_ID
    assert ids.count(BOS_ID) == 1
    assert pipeline.ctx.tokenizer.decode(list(ids)) == "<s><s>hello"


@pytest.mark.parametrize("message", ["hello", 3, None, ["hello"]])
def test_what_is_no_message_is_refused(pipeline: InputPipeline, message: Any) -> None:
    with pytest.raises(RequestError, match="a message must be a mapping") as caught:
        pipeline.prepare_chat([*HELLO, message])
    assert caught.value.param == "messages.1"


def test_the_hubs_template_renders_as_in_transformers(text_only: Path) -> None:
    (text_only / "chat_template.json").write_text(json.dumps({"chat_template": HUB}))
    pipeline = open_pipeline(text_only)
    text, image = {"type": "text", "text": "Which  <image> one?"}, {"type": "image"}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [text, image, image]},
        {"role": "assistant", "content": "The first."},
        {"role": "user", "content": [image, {"type": "text", "text": "And now?"}]},
    ]
    rendered, ids = pipeline.chat.encode(messages)
    assert rendered == (
        "Be brief. USER: <image>\n<image>\nWhich  <image> one? ASSISTANT: The first. "
        "USER: <image>\nAnd now? ASSISTANT:"
    )
    assert ids[0] == BOS_ID
    assert ids.count(IMAGE_ID) == 3
    assert pipeline.ctx.tokenizer.decode(list(ids)) == "<s>" + rendered
