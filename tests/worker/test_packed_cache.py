"""Quantised weights that are kept on disk are those that would be made, or they aren't used."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from checkpoints import make_llava
from mm_engine.config import EngineConfig
from mm_engine.errors import StartupError
from mm_engine.models import packed_cache, quantization
from mm_engine.models.layers import Linear
from mm_engine.models.packed_cache import SUFFIX, key_of
from mm_engine.worker.loader import load_model, open_model

CPU = torch.device("cpu")


@pytest.fixture
def quantised(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each weight that is quantised."""
    noted = list[int]()
    inner = quantization.LayerQuantizer.quantize

    def quantize(self: quantization.LayerQuantizer, weight: Tensor) -> tuple[Tensor, ...]:
        noted.append(weight.numel())
        return inner(self, weight)

    monkeypatch.setattr(quantization.LayerQuantizer, "quantize", quantize)
    return noted


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("saved"), dtype=torch.bfloat16)


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    """A checkpoint of its own, to be changed."""
    return Path(shutil.copytree(saved, tmp_path / "checkpoint"))


def load(checkpoint: Path, folder: Path, **options: Any) -> dict[str, Tensor]:
    """The parts of the quantised layers of a model loaded with the cache in `folder`."""
    options = {"dtype": "bfloat16", "quantization": "int4"} | options
    config = EngineConfig(
        model=str(checkpoint), progress=False, packed_cache=str(folder), **options
    )
    model = load_model(open_model(config), CPU).model
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear) and m.quantizer}
    assert layers and all(not layer.weight.numel() for layer in layers.values())
    return {f"{n} {i}": t for n, layer in layers.items() for i, t in enumerate(layer.quantized)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def kept(folder: Path) -> Path:
    (path,) = folder.iterdir()
    assert path.suffix == SUFFIX and path.stat().st_mode & 0o077 == 0
    return path


@pytest.mark.parametrize("name", ["int4", "int8", "fp8"])
def test_the_second_start_quantises_nothing_and_loads_the_same(
    name: str, checkpoint: Path, tmp_path: Path, quantised: list[int]
) -> None:
    folder = tmp_path / "new" / "cache"
    first = load(checkpoint, folder, quantization=name)
    num_quantised = len(quantised)
    written = kept(folder).stat().st_ino
    assert same(load(checkpoint, folder, quantization=name), first)
    assert len(quantised) == num_quantised > 0
    assert kept(folder).stat().st_ino == written


def cut_off(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip(path: Path, at: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(at * (len(content) - 1))] ^= 4
    path.write_bytes(content)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut off": cut_off,
    "another file": lambda path: path.write_bytes(b"{}" * 5000),
    "a bit of its header": lambda path: flip(path, 0.002),
    "a bit of a weight": lambda path: flip(path, 0.5),
    "its last bit": lambda path: flip(path, 1.0),
    "others may write": lambda path: path.chmod(0o666),
    "a link": lambda path: path.symlink_to(path.rename(path.with_name("elsewhere"))),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_is_damaged_is_made_anew(
    damage: str,
    checkpoint: Path,
    tmp_path: Path,
    quantised: list[int],
    caplog: pytest.LogCaptureFixture,
) -> None:
    first = load(checkpoint, tmp_path / "cache")
    num_quantised = len(quantised)
    path = kept(tmp_path / "cache")
    DAMAGE[damage](path)
    with caplog.at_level(logging.WARNING):
        again = load(checkpoint, tmp_path / "cache")
    assert same(again, first) and len(quantised) == 2 * num_quantised
    (record,) = caplog.records
    assert record.getMessage().startswith(f"Packed weights can't be used: {path} (")
    load(checkpoint, tmp_path / "cache")  # it was written again
    assert len(quantised) == 2 * num_quantised


def change_weights(checkpoint: Path) -> None:
    flip(checkpoint / "model.safetensors", 0.9)


def touch(checkpoint: Path) -> None:
    os.utime(checkpoint / "model.safetensors", (1, 1))


@pytest.mark.parametrize("change", [change_weights, touch])
def test_other_weights_have_another_file(
    change: Callable[[Path], None], checkpoint: Path, tmp_path: Path, quantised: list[int]
) -> None:
    load(checkpoint, tmp_path / "cache")
    num_quantised = len(quantised)
    change(checkpoint)
    load(checkpoint, tmp_path / "cache")
    assert len(quantised) == 2 * num_quantised
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_file_under_another_name_is_not_used(
    checkpoint: Path, tmp_path: Path, quantised: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    load(checkpoint, tmp_path / "cache")
    before, num_quantised = kept(tmp_path / "cache"), len(quantised)
    change_weights(checkpoint)
    load(checkpoint, tmp_path / "other")
    kept(tmp_path / "other").write_bytes(before.read_bytes())
    load(checkpoint, tmp_path / "other")
    assert len(quantised) == 3 * num_quantised
    assert "(it was stored for other weights)" in caplog.text


def test_the_key_is_of_weights_code_and_facts(tmp_path: Path) -> None:
    weights, code = tmp_path / "weights", tmp_path / "code"
    weights.write_bytes(bytes(range(100)))
    code.write_bytes(b"code")
    first = key_of([weights], [code], scheme="int4", isa="avx2")
    assert first == key_of([weights], [code], isa="avx2", scheme="int4")
    keys = {first, key_of([weights], [], scheme="int4"), key_of([weights], [code], scheme="int8")}
    code.write_bytes(b"other code")
    keys.add(key_of([weights], [code], scheme="int4", isa="avx2"))
    assert len(keys) == 4


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs permissions as POSIX has them")
def test_a_folder_that_others_can_write_to_is_neither_read_nor_written(
    checkpoint: Path, tmp_path: Path, quantised: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    load(checkpoint, folder)
    num_quantised, path = len(quantised), kept(folder)
    folder.chmod(0o777)
    load(checkpoint, folder)
    assert len(quantised) == 2 * num_quantised and kept(folder) == path
    assert caplog.text.count("other users can write to the folder: chmod go-w") == 2


def test_a_folder_that_can_not_be_made_costs_a_line(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    load(checkpoint, tmp_path / "file" / "cache")
    said = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert [line.partition(":")[0] for line in said][-1] == "Packed weights can't be kept"


def test_a_write_that_fails_leaves_nothing(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def full(_: object, path: str, **__: object) -> None:
        Path(path).write_bytes(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_cache, "save_file", full)
    load(checkpoint, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())
    assert "Packed weights can't be kept" in caplog.text and "No space left" in caplog.text


def test_the_least_recently_used_go(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_cache, "MAX_FILES", 2)
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    (folder / "mine.safetensors").write_text("not ours")
    (folder / ".new-left").write_text("by a process that was killed")
    os.utime(folder / ".new-left", (1, 1))
    (folder / ".new-now").write_text("another process is at it")
    names = []
    for i, name in enumerate(("int4", "int8", "fp8")):
        load(checkpoint, folder, quantization=name)
        new = set(folder.glob(f"*{SUFFIX}")) - set(names)
        names += sorted(new)
        if i < 2:
            os.utime(names[-1], (100 - i, 100 - i))
    load(checkpoint, folder, quantization="int4")
    left = {path.name for path in folder.iterdir()}
    assert left == {names[0].name, names[2].name, "mine.safetensors", ".new-now"}


def test_processes_that_start_at_once_each_get_whole_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    code = (
        "import sys, torch\n"
        "from mm_engine.config import EngineConfig\n"
        "from mm_engine.worker.loader import load_model, open_model\n"
        "config = EngineConfig(model=sys.argv[1], packed_cache=sys.argv[2], progress=False,"
        " quantization='int4', dtype='bfloat16')\n"
        "for _ in range(5):\n"
        "    load_model(open_model(config), torch.device('cpu'))\n"
    )
    command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path / "cache")]
    started = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=300)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert not any("can't be" in text for text in said)
    assert kept(tmp_path / "cache")


def test_dummy_weights_are_not_kept(checkpoint: Path, tmp_path: Path) -> None:
    load(checkpoint, tmp_path / "cache", load_format="dummy")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("folder", ["", 3, Path("cache")])
def test_the_folder_must_be_a_name(folder: Any) -> None:
    with pytest.raises(StartupError, match="packed_cache is out of range: .*a folder's name"):
        EngineConfig(model="m", packed_cache=folder)
