"""A safetensors file: tensors that are mapped into memory, and read into their places.

To read a mapped tensor takes a page fault for every few pages, and many times as long where
several threads have them at once; until the file is closed its pages count as the process's, too.
So what goes where it will stay as it is, is read from the file. The mapping is for all others: who
looks at a tensor, holds it back or computes with it sees a tensor like any.
"""

from __future__ import annotations

import io
import json
import mmap
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

#: By the format's names. Of others, safetensors says what they are.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
LEAST_READ = 2**20  # bytes that a thread is worth
MAX_READERS = 4  # threads; more don't copy from the system's memory any faster
_seeking = threading.Lock()
_PLACE = "mm_engine_place"  # the attribute of a mapped tensor that says where in which file it is


class TensorFile:
    """A file of tensors, open until it is closed; tensors stay valid after that.

    Raises:
        SafetensorError, OSError, ValueError: the file can't be read or isn't whole.
    """

    def __init__(self, path: Path) -> None:
        with safe_open(path, framework="pt") as checked:  # sizes, offsets and names
            self.names = list(checked.keys())
        self._path = path
        self._file = io.FileIO(path)
        header_size = int.from_bytes(self._file.read(8), "little")
        self._header: dict[str, Any] = json.loads(self._file.read(header_size))
        self._start = 8 + header_size
        self._num_readers = min(MAX_READERS, torch.get_num_threads())
        self._readers = ThreadPoolExecutor(self._num_readers, "weights")  # starts none by itself
        self._mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_COPY)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every `(name, tensor)`; nothing of them is read yet."""
        for name in self.names:
            entry = self._header[name]
            begin, end = entry["data_offsets"]
            dtype = DTYPES.get(entry["dtype"])
            if dtype is None or begin == end:
                with safe_open(self._path, framework="pt") as shard:
                    yield name, shard.get_tensor(name)
                continue
            place = self._start + begin
            count = (end - begin) // dtype.itemsize
            flat = torch.frombuffer(self._mapped, dtype=dtype, count=count, offset=place)
            tensor = flat.view(entry["shape"])
            setattr(tensor, _PLACE, (self, place))
            yield name, tensor

    def read(self, offset: int, place: Tensor) -> None:
        """Fill `place`, which is contiguous, with what stands in the file from `offset` on."""
        whole = place.detach().reshape(-1).view(torch.uint8).numpy().data
        step = max(LEAST_READ, -(-len(whole) // self._num_readers))
        starts = range(0, len(whole), step)
        if len(starts) == 1:
            self._fill(whole, offset)
            return
        reading = [
            self._readers.submit(self._fill, whole[start : start + step], offset + start)
            for start in starts
        ]
        for part in reading:
            part.result()

    def _fill(self, left: memoryview, offset: int) -> None:
        while len(left):
            num_read = _read_at(self._file, left, offset)
            if not num_read:
                raise SafetensorError("the file has become shorter")
            left, offset = left[num_read:], offset + num_read

    def close(self) -> None:
        """Read no more of it."""
        self._readers.shutdown()
        self._file.close()


def _read_at(file: io.FileIO, place: memoryview, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file.fileno(), [place], offset)
    with _seeking:  # a file has one position
        file.seek(offset)
        return file.readinto(place)


def copy_into(place: Tensor, original: Tensor, piece: Tensor) -> None:
    """Copy `piece`, which is (a view of) `original`, converting dtype and device.

    What is still as a file has it is read from there.

    Raises:
        SafetensorError, OSError: it can't be read any more.
    """
    file, offset = getattr(original, _PLACE, (None, 0))
    within = piece.data_ptr() - original.data_ptr()
    if (
        file is None
        or file._file.closed
        or original._version  # somebody has written to it
        or place.dtype != piece.dtype
        or place.device.type != "cpu"
        or place.shape != piece.shape
        or not place.is_contiguous()
        or not piece.is_contiguous()
        or not 0 <= within < original.nbytes  # it is none of its views
    ):
        place.copy_(piece)
    else:
        file.read(offset + within, place)
