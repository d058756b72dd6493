"""Tensors of a file are those that safetensors reads; what is copied into its place is read."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mm_engine.errors import StartupError
from mm_engine.models import checkpoint, tensor_file
from mm_engine.models.tensor_file import TensorFile, copy_into

TENSORS = {
    "rows": torch.arange(24, dtype=torch.bfloat16).view(6, 4),
    "wide": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "counter": torch.tensor(7),
    "flag": torch.tensor([True, False, True]),
    "none": torch.empty(0, 3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "complex": torch.tensor([1 + 2j]),  # of a type that is left to safetensors
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "model.safetensors"
    save_file(TENSORS, file)
    return file


@contextlib.contextmanager
def opened(path: Path) -> Iterator[dict[str, Tensor]]:
    with contextlib.closing(TensorFile(path)) as file:
        yield dict(file.tensors())


def test_tensors_are_those_of_safetensors_and_outlive_the_file(path: Path) -> None:
    with opened(path) as tensors:
        pass
    expected = load_file(path)
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


def test_what_stays_as_it_is_is_read_from_the_file(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = list[int]()
    inner = TensorFile.read

    def noted(self: TensorFile, offset: int, place: Tensor) -> None:
        read.append(place.numel())
        inner(self, offset, place)

    monkeypatch.setattr(TensorFile, "read", noted)
    with opened(path) as tensors:
        for name in ("rows", "wide", "counter", "flag", "bytes"):
            place = torch.zeros_like(tensors[name])
            copy_into(place, tensors[name], tensors[name])
            assert torch.equal(place, TENSORS[name]), name
        rows, some = tensors["rows"], torch.zeros(2, 4, dtype=torch.bfloat16)
        copy_into(some, rows, rows[3:5])
        assert torch.equal(some, TENSORS["rows"][3:5])
    assert read == [24, 15, 1, 3, 5, 8]


@pytest.mark.parametrize("positioned", [True, False], ids=["preadv", "seek"])
def test_large_tensors_are_read_by_several_threads(
    positioned: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tensor_file, "LEAST_READ", 1000)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if not positioned:
        monkeypatch.delattr(os, "preadv", raising=False)
    large = torch.randn(37, 111)
    save_file({"small": torch.zeros(3), "large": large}, tmp_path / "file")
    readers = set[str]()
    inner = TensorFile._fill

    def noted(self: TensorFile, left: memoryview, offset: int) -> None:
        readers.add(threading.current_thread().name)
        inner(self, left, offset)

    monkeypatch.setattr(TensorFile, "_fill", noted)
    with opened(tmp_path / "file") as tensors:
        place = torch.zeros(37, 111)
        copy_into(place, tensors["large"], tensors["large"])
    assert torch.equal(place, large)
    assert readers and all(name.startswith("weights") for name in readers)
    assert not any(thread.name.startswith("weights") for thread in threading.enumerate())


def test_other_copies_are_of_what_the_tensor_holds(path: Path) -> None:
    with opened(path) as tensors:
        rows, wide = tensors["rows"], tensors["wide"]
        for place, piece in (
            (torch.zeros(6, 4), rows),  # another dtype
            (torch.zeros(6, 2, dtype=torch.bfloat16), rows[:, 1:3]),  # columns
            (torch.zeros(4, 6, dtype=torch.bfloat16).T, rows),  # a place with gaps
            (torch.zeros(4, 6, dtype=torch.bfloat16), rows.T),
            (torch.zeros(6, 4, dtype=torch.bfloat16), rows * 2),
        ):
            copy_into(place, rows, piece)
            assert torch.equal(place, piece.to(place.dtype))
        wide += 1  # a plugin may
        place = torch.zeros(3, 5)
        copy_into(place, wide, wide)
        assert torch.equal(place, TENSORS["wide"] + 1)
    place = torch.zeros(6, 4, dtype=torch.bfloat16)
    copy_into(place, rows, rows)  # after it was closed
    assert torch.equal(place, TENSORS["rows"])


def test_a_file_that_is_cut_off_meanwhile_is_said_to_be(path: Path) -> None:
    with opened(path) as tensors:
        last = max(("wide", "rows"), key=lambda name: tensors[name].data_ptr())
        with open(path, "r+b") as file:
            file.truncate(path.stat().st_size - TENSORS["bytes"].nbytes - 64)
        with pytest.raises(SafetensorError, match="has become shorter"):
            copy_into(torch.zeros_like(tensors[last]), tensors[last], tensors[last])


@pytest.mark.parametrize("keep", [0, 7, 40, -1])
def test_a_file_that_is_not_whole_is_refused(keep: int, saved: Path, tmp_path: Path) -> None:
    content = (saved / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:keep])
    with pytest.raises(StartupError, match="a shard of the weights is corrupt"):
        list(checkpoint.read_weights(tmp_path, progress=False))
