"""The checkpoint with random weights that is made of a small config."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer

from mm_engine.errors import StartupError
from mm_engine.testing.random_checkpoint import byte_tokenizer, random_checkpoint


@pytest.fixture(autouse=True)
def temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is found that was made before, and nothing is left."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def config_folder(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def change(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_it_is_an_ordinary_checkpoint(config_folder: Path) -> None:
    made, note = random_checkpoint(config_folder)
    assert note is None
    model: Any = AutoModelForImageTextToText.from_pretrained(made)
    assert model.dtype == torch.float32
    tokenizer = AutoTokenizer.from_pretrained(made)
    assert tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_id
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert (made / "preprocessor_config.json").is_file()
    assert (made / "config.json").read_bytes() == (config_folder / "config.json").read_bytes()


def test_it_is_made_once(config_folder: Path) -> None:
    made, _ = random_checkpoint(config_folder)
    before = (made / "model.safetensors").stat().st_mtime_ns
    again, _ = random_checkpoint(config_folder)
    assert again == made
    assert (made / "model.safetensors").stat().st_mtime_ns == before


def test_another_config_makes_another(config_folder: Path) -> None:
    made, _ = random_checkpoint(config_folder)
    change(config_folder, vision_feature_layer=-1)
    other, _ = random_checkpoint(config_folder)
    assert other != made


def test_weights_are_the_same_each_time(config_folder: Path) -> None:
    first = load_file(random_checkpoint(config_folder)[0] / "model.safetensors")
    shutil.rmtree(random_checkpoint(config_folder)[0])
    torch.manual_seed(17)
    second = load_file(random_checkpoint(config_folder)[0] / "model.safetensors")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_no_tensor_is_what_leaving_it_out_would_make(config_folder: Path) -> None:
    weights = load_file(random_checkpoint(config_folder)[0] / "model.safetensors")
    constant = [name for name, tensor in weights.items() if tensor.unique().numel() == 1]
    assert constant == []


def test_global_random_state_is_left_alone(config_folder: Path) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    random_checkpoint(config_folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_tokenizer_of_the_folder_is_kept(config_folder: Path, llava: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(llava / name, config_folder / name)
    made, _ = random_checkpoint(config_folder)
    assert (made / "tokenizer.json").read_bytes() == (llava / "tokenizer.json").read_bytes()


@pytest.mark.parametrize("text", ["naïve café", "你好, 🙂", "  two  spaces\n", "<image>x"])
def test_tokenizer_writes_any_text(config_folder: Path, text: str) -> None:
    tokenizer = byte_tokenizer(AutoConfig.from_pretrained(config_folder))
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text
    assert max(ids) < 384


def test_tokenizer_takes_the_configs_numbers(config_folder: Path) -> None:
    config = AutoConfig.from_pretrained(config_folder)
    config.image_token_id = config.image_token_index = 380
    config.text_config.bos_token_id = 40
    config.text_config.pad_token_id = None
    tokenizer = byte_tokenizer(config)
    assert tokenizer("a<image>")["input_ids"][0] == 40
    assert tokenizer("a<image>")["input_ids"][-1] == 380
    assert tokenizer.pad_token is None
    assert len(tokenizer.get_vocab()) == 381


def test_vocabulary_too_small_for_bytes_is_refused(config_folder: Path) -> None:
    config = AutoConfig.from_pretrained(config_folder)
    config.text_config.vocab_size = 200
    with pytest.raises(StartupError, match="vocabulary is too small .*: 200.*vocab_size .* 260"):
        byte_tokenizer(config)


def test_config_that_cannot_be_read_is_refused(config_folder: Path) -> None:
    change(config_folder, model_type="nobody-knows-it")
    with pytest.raises(StartupError, match="the config for tests can't be read"):
        random_checkpoint(config_folder)
