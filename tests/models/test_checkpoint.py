"""What is wrong with a checkpoint's folder is said in one line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mm_engine.errors import StartupError
from mm_engine.models import checkpoint


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint, without its weights, to be broken."""
    path = tmp_path / "copy"
    shutil.copytree(saved, path, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(StartupError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".")
    return message


def change(file: Path, **changes: Any) -> None:
    """Set fields of a JSON file; None takes one out."""
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({key: v for key, v in fields.items() if v is not None}))


def test_a_folder_is_found_and_made_absolute(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(saved.parent)
    assert checkpoint.locate(saved.name) == saved.resolve()


def test_a_folder_without_a_config_is_no_checkpoint(tmp_path: Path) -> None:
    assert f"{tmp_path} has no config.json" in refused(lambda: checkpoint.locate(str(tmp_path)))


@pytest.mark.parametrize("name", ["./nowhere", "/no/such/folder", "a/b/c", "~/nowhere-at-all"])
def test_a_path_that_is_no_folder_is_not_looked_up_on_the_hub(name: str) -> None:
    assert f"checkpoint not found: {name} is not a folder" in refused(
        lambda: checkpoint.locate(name)
    )


def test_a_file_is_no_checkpoint(saved: Path) -> None:
    file = str(saved / "config.json")
    assert "is not a folder" in refused(lambda: checkpoint.locate(file))


@pytest.mark.parametrize("name", ["nobody/no-such-model", "two words", "no-such-model"])
def test_a_name_that_the_hub_does_not_have(name: str) -> None:
    """Tests run offline, where nothing is to be had."""
    assert f"{name} is neither a folder nor" in refused(lambda: checkpoint.locate(name))


NO_TYPE = '{"model_type": "no_such", "architectures": ["Any"]}'


def test_a_good_config_is_read(saved: Path) -> None:
    config, architecture = checkpoint.read_config(saved)
    assert architecture == "LlavaForConditionalGeneration"
    assert config.text_config.hidden_size == 64


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "\x00\xff", '{"architectures": ["A"], "model_type": "x"}']
)
def test_a_config_that_can_not_be_read(text: str, folder: Path) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json can't be read" in refused(lambda: checkpoint.read_config(folder))


@pytest.mark.parametrize(
    "fields",
    [
        {"text_config": 3},
        {"text_config": {"model_type": "llama", "hidden_size": "wide"}},
        {"text_config": {"model_type": "llama", "num_attention_heads": 0}},
    ],
    ids=["no-mapping", "no-number", "no-heads"],
)
def test_a_config_with_values_of_other_types(fields: dict[str, Any], folder: Path) -> None:
    change(folder / "config.json", **fields)
    assert "config.json can't be read" in refused(lambda: checkpoint.read_config(folder))


@pytest.mark.parametrize("architectures", [None, [], ["A", "B"]])
def test_a_config_must_name_one_architecture(architectures: list[str] | None, folder: Path) -> None:
    change(folder / "config.json", architectures=architectures)
    assert "must name one architecture" in refused(lambda: checkpoint.read_config(folder))


def test_a_folder_without_tokenizer(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "tokenizer can't be read" in refused(lambda: checkpoint.read_tokenizer(folder))


@pytest.mark.parametrize("text", ["", "{}", "[", '{"model": {"type": "None"}}'])
def test_a_tokenizer_that_can_not_be_read(text: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(text)
    assert "tokenizer can't be read" in refused(lambda: checkpoint.read_tokenizer(folder))


def eos(folder: Path) -> tuple[int, ...]:
    config, _ = checkpoint.read_config(folder)
    return checkpoint.read_eos_token_ids(folder, config, checkpoint.read_tokenizer(folder))


def test_ids_that_end_an_answer_come_from_the_generation_config_first(folder: Path) -> None:
    file = folder / "generation_config.json"
    change(file, eos_token_id=[7, 9])
    assert eos(folder) == (7, 9)
    change(file, eos_token_id=8)
    assert eos(folder) == (8,)


def test_ids_that_end_an_answer_fall_back_to_config_and_tokenizer(folder: Path) -> None:
    (folder / "generation_config.json").unlink()
    text: dict[str, Any] = json.loads((folder / "config.json").read_text())["text_config"]
    change(folder / "config.json", text_config={**text, "eos_token_id": 11})
    assert eos(folder) == (11,)
    change(folder / "config.json", text_config={**text, "eos_token_id": None}, eos_token_id=None)
    assert eos(folder) == (2,)


@pytest.mark.parametrize("text", ["{", "[]", "\x00"])
def test_a_generation_config_that_can_not_be_read(text: str, folder: Path) -> None:
    (folder / "generation_config.json").write_text(text)
    assert "generation_config.json can't be read" in refused(lambda: eos(folder))


@pytest.mark.parametrize("value", ["</s>", [2, "</s>"], 1.5, True])
def test_an_end_that_is_no_token_id_is_refused(value: Any, folder: Path) -> None:
    change(folder / "generation_config.json", eos_token_id=value)
    assert "eos_token_id is no token id" in refused(lambda: eos(folder))


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "shards/a.safetensors", "..\\a"])
def test_an_index_names_files_of_the_checkpoint_only(name: str, folder: Path) -> None:
    (folder / "shards").mkdir()
    (folder / "shards" / "a.safetensors").write_bytes(b"")
    (folder.parent / "secret").write_bytes(b"")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}))
    said = refused(lambda: checkpoint.weight_files(folder))
    assert f"names a file outside of the checkpoint: {index} names {name}." in said
