"""Quantised weights kept on disk, so that the next start reads them instead of making them anew.

A file for each checkpoint and way to quantise it. Its name says what it was made of, by `key_of`,
so that a stale one isn't found; its content is checked before it is used. A folder that others can
write to isn't used at all: they could put other weights there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import stat
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm_engine.models.layers import Linear
from mm_engine.models.tensor_file import TensorFile, copy_into

logger = logging.getLogger(__name__)

SUFFIX = ".mm-engine-packed"
NEW = ".new-"  # the start of the name of one that is being written
MAX_FILES = 8  # the least recently used ones go
MAX_WRITING = 86400.0  # seconds that one may take to be written
#: What damaged files, missing ones and full disks make the system and safetensors raise.
FAILURES = (OSError, ValueError, KeyError, TypeError, SafetensorError)


class Refused(Exception):
    """The cache can't be used; the message says why."""


def key_of(weights: Iterable[Path], code: Iterable[Path], **facts: Any) -> str:
    """The name of what is made of the files `weights` by the files `code`, and of other `facts`.

    Weights are told apart by name, size, time of change and header; code by its content. To read
    all of the weights would take as long as to quantise them.

    Raises:
        OSError: a file can't be read.
    """
    known: list[Any] = [sorted((name, str(value)) for name, value in facts.items())]
    for path in weights:
        with open(path, "rb") as file:
            about = os.fstat(file.fileno())
            header = file.read(min(int.from_bytes(file.read(8), "little"), about.st_size))
        digest = hashlib.sha256(header).hexdigest()
        known.append((path.name, about.st_size, about.st_mtime_ns, digest))
    known += [hashlib.sha256(path.read_bytes()).hexdigest() for path in code]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


class PackedCache:
    """The quantised layers of one model, in a file of `folder`.

    `layers` maps names to layers that have a quantizer. What goes wrong costs time only: it is
    logged in a line, and the weights are quantised.
    """

    def __init__(self, folder: Path, key: str, layers: Mapping[str, Linear]) -> None:
        self.path = folder / f"{key}{SUFFIX}"
        self.layers = layers

    def restore(self) -> bool:
        """Give every layer what was stored for it; False: there is nothing that can be used."""
        try:
            self._check_folder(create=False)
            made = self._read()
        except FileNotFoundError:
            return False
        except (Refused, *FAILURES) as error:
            logger.warning("Packed weights can't be used: %s (%s).", self.path, error)
            return False
        for name, layer in self.layers.items():
            layer.quantized = made[name]
        with contextlib.suppress(OSError):
            os.utime(self.path)  # it was used
        return True

    def store(self) -> None:
        """Write what the layers were quantised to; others see the whole file or none."""
        try:
            self._check_folder(create=True)
            self._write()
            self._tidy()
        except (Refused, *FAILURES) as error:
            logger.warning("Packed weights can't be kept: %s (%s).", self.path, error)
        else:
            logger.info("Packed weights are kept for the next start: %s", self.path)

    def _tidy(self) -> None:
        """Take out what was used longest ago, and what a process that was killed left behind."""
        folder, now = self.path.parent, time.time()
        with contextlib.suppress(FileNotFoundError):  # another process does the same
            for path in folder.glob(f"{NEW}*"):
                if now - path.stat().st_mtime > MAX_WRITING:
                    path.unlink()
            by_use = sorted(folder.glob(f"*{SUFFIX}"), key=lambda path: -path.stat().st_mtime)
            for path in by_use[MAX_FILES:]:
                path.unlink()

    def _check_folder(self, *, create: bool) -> None:
        folder = self.path.parent
        if create:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        _check_ours(folder.stat(), "the folder")

    def _read(self) -> dict[str, tuple[Tensor, ...]]:
        _check_ours(self.path.lstat(), "the file")
        with safe_open(self.path, framework="pt") as file:
            about = file.metadata() or {}
        if about["key"] != self.path.name.removesuffix(SUFFIX):
            raise Refused("it was stored for other weights")
        digests: dict[str, str] = json.loads(about["sha256"])
        found: dict[str, Tensor] = {}
        with contextlib.closing(TensorFile(self.path)) as file:
            for name, mapped in file.tensors():
                found[name] = torch.empty_like(mapped)
                copy_into(found[name], mapped, mapped)
                if digest_of(name, found[name]) != digests[name]:
                    raise Refused(f"{name} isn't what was stored")
        made: dict[str, tuple[Tensor, ...]] = {}
        for name in self.layers:
            parts = [found.pop(_part(name, i)) for i in range(int(digests[f"{name} parts"]))]
            made[name] = tuple(parts)
        return made

    def _write(self) -> None:
        tensors: dict[str, Tensor] = {}
        digests: dict[str, str] = {}
        for name, layer in self.layers.items():
            digests[f"{name} parts"] = str(len(layer.quantized))
            for i, part in enumerate(layer.quantized):
                tensors[_part(name, i)] = part.contiguous()
        digests |= {name: digest_of(name, tensor) for name, tensor in tensors.items()}
        key = self.path.name.removesuffix(SUFFIX)
        about = {"key": key, "sha256": json.dumps(digests)}
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=NEW)  # mode 0600
        os.close(descriptor)
        try:
            save_file(tensors, temporary, metadata=about)
            os.replace(temporary, self.path)
        except BaseException:
            os.unlink(temporary)
            raise


def digest_of(name: str, tensor: Tensor) -> str:
    """SHA-256 of a tensor's name, dtype, shape and bytes."""
    digest = hashlib.sha256(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _part(name: str, index: int) -> str:
    return f"{name}/{index}"


def _check_ours(about: os.stat_result, what: str) -> None:
    """Raise `Refused` if others than this user and root can write there."""
    if hasattr(os, "getuid") and about.st_uid not in (os.getuid(), 0):
        raise Refused(f"{what} belongs to another user")
    if stat.S_ISLNK(about.st_mode):
        raise Refused(f"{what} is a link")
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise Refused(f"other users can write to {what}: chmod go-w")
