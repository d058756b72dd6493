"""The engines that take part: how each is started, and those that are running."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cpu_peer_parts.client import Peer, PeerError
from cpu_peer_parts.rows import OURS
from cpu_peer_parts.sizes import QUANTIZATION_OF_LLAMA_CPP, Sizes

TRANSFORMERS, VLLM, LLAMA_CPP = "transformers", "vLLM", "llama.cpp"
ENGINES = (OURS, TRANSFORMERS, VLLM, LLAMA_CPP)
SCRIPTS = {
    OURS: "run_ours.py",
    TRANSFORMERS: "run_transformers.py",
    VLLM: "run_vllm.py",
    LLAMA_CPP: "run_llama_cpp.py",
}
FLAGS = {VLLM: "--vllm", LLAMA_CPP: "--llama-cpp"}
LOAD_LIMIT = 900.0  # seconds: a peer may compile


@dataclass(slots=True)
class Fleet:
    """Starts engines when they are first asked for, and remembers why one can't be.

    An engine with quantised weights is another process than the one without.
    """

    checkpoint: Path
    folder: Path  # for logs, and what engines keep between two launches
    sizes: Sizes
    dtype: str
    threads: int
    limit: float  # seconds that an answer may take
    pythons: dict[str, str]  # of the peers that have venvs of their own
    say: Callable[[str], None]
    loaded: dict[str, Any] = field(default_factory=dict)  # what each told of itself
    _running: dict[tuple[str, str | None], Peer] = field(default_factory=dict)
    _dead: dict[tuple[str, str | None], str] = field(default_factory=dict)

    def missing(self) -> dict[str, str]:
        """The engines that can't take part at all, with the reason."""
        found = {}
        for name, flag in FLAGS.items():
            if name not in self.pythons:
                found[name] = f"no {flag} PATH was given"
            elif shutil.which(self.pythons[name]) is None:
                found[name] = f"{flag}: there is no program {self.pythons[name]}"
        return found

    def names(self) -> list[str]:
        """Of those that take part."""
        return [name for name in ENGINES if name not in self.missing()]

    def environment(self, name: str) -> dict[str, str]:
        """The same number of threads for all; a venv of its own sees nothing of this one."""
        threads = str(self.threads)
        found = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        found |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        if name in FLAGS:
            found.pop("PYTHONPATH", None)
        else:
            found["PYTHONPATH"] = os.pathsep.join(entry for entry in sys.path if entry)
        if name == VLLM:
            cores = cores_of_this_process()[: self.threads]
            found["VLLM_CPU_OMP_THREADS_BIND"] = ",".join(map(str, cores))
            found["VLLM_CACHE_ROOT"] = str(self.folder / "vllm")  # its first launch compiles
            found["VLLM_NO_USAGE_STATS"] = found["DO_NOT_TRACK"] = "1"
        return found

    def start(self, name: str) -> Peer:
        """A new process of an engine, with nothing loaded."""
        self.hush()
        python = self.pythons.get(name, sys.executable)
        log = self.folder / f"{SCRIPTS[name].removesuffix('.py')}.log"
        return Peer(python, SCRIPTS[name], self.environment(name), log)

    def hush(self, but: Peer | None = None) -> None:
        """Stop all that run but one: threads may wait in a loop long after an answer."""
        for peer in self._running.values():
            if peer is not but:
                peer.pause()
        if but is not None:
            but.resume()

    def load(self, peer: Peer, name: str, quantization: str | None = None) -> None:
        """Have a process load the model."""
        sizes = self.sizes
        arguments: dict[str, Any] = {"model": str(self.checkpoint)}
        if name == LLAMA_CPP:
            arguments["model"] = self.prepare(quantization)
        elif quantization is not None:
            arguments["quantization"] = quantization
        told = peer.ask(
            "load",
            LOAD_LIMIT,
            **arguments,
            dtype=self.dtype,
            threads=self.threads,
            max_model_len=sizes.max_model_len,
            max_num_seqs=max(*sizes.decodes, sizes.num_requests),
            kv_bytes=sizes.kv_bytes,
        )
        self.loaded.setdefault(name, told)

    def prepare(self, quantization: str | None = None) -> str:
        """Path of llama.cpp's file, which is written beside the checkpoint if it isn't there."""
        quantized = None if quantization is None else QUANTIZATION_OF_LLAMA_CPP[quantization]
        name = f"text-{quantized or self.dtype}.gguf"
        if (self.checkpoint / name).is_file():
            return str(self.checkpoint / name)
        self.say(f"writing {name}")
        with self.one(LLAMA_CPP) as peer:
            told = peer.ask(
                "prepare",
                LOAD_LIMIT,
                model=str(self.checkpoint),
                folder=str(self.checkpoint),
                dtype=self.dtype,
                quantization=quantized,
            )
        return str(told["path"])

    @contextmanager
    def one(self, name: str) -> Iterator[Peer]:
        """A process that ends with the block."""
        peer = self.start(name)
        try:
            yield peer
        finally:
            peer.close()

    def get(self, name: str, quantization: str | None = None) -> Peer:
        """The running process of an engine, with the model loaded.

        Raises:
            PeerError: it can't be loaded; the second time with the first time's reason.
        """
        key = name, quantization
        if key in self._dead:
            raise PeerError(self._dead[key])
        peer = self._running.get(key)
        if peer is None or not peer.alive:
            self.close(name, quantization)
            self.say(f"starting {' '.join(filter(None, key))}")
            peer = self.start(name)
            try:
                self.load(peer, name, quantization)
            except PeerError as error:
                self._dead[key] = str(error)
                peer.close()
                raise
            except BaseException:
                peer.close()
                raise
            self._running[key] = peer
        return peer

    def keep(self, name: str, peer: Peer) -> None:
        """Take over a process that has the model loaded."""
        self.close(name)
        self._running[name, None] = peer

    def ask(
        self,
        name: str,
        prompts: list[list[int]],
        num_tokens: int,
        *,
        images: list[int] | None = None,
        quantization: str | None = None,
    ) -> dict[str, Any]:
        """Have an engine answer: see the drivers' `answer`. `images` are seeds."""
        return self.answer(self.get(name, quantization), prompts, num_tokens, images or [])

    def answer(
        self, peer: Peer, prompts: list[list[int]], num_tokens: int, images: list[int]
    ) -> dict[str, Any]:
        """The same of a given process."""
        size = self.sizes.scale.image_size
        self.hush(peer)
        return peer.ask(
            "answer",
            self.limit,
            prompts=prompts,
            num_tokens=num_tokens,
            images=images,
            image_size=size,
        )

    def logits(self, name: str, quantization: str | None = None) -> np.ndarray[Any, Any]:
        """An engine's logits `[prompts, vocabulary]`, those that follow `Sizes.error_prompts`."""
        path = self.folder / "logits.npy"
        peer = self.get(name, quantization)
        self.hush(peer)
        peer.ask("logits", self.limit, prompts=self.sizes.error_prompts, path=str(path))
        found: np.ndarray[Any, Any] = np.load(path)
        path.unlink()
        return found

    def close(self, name: str, quantization: str | None = None) -> None:
        """End an engine's process, if there is one."""
        peer = self._running.pop((name, quantization), None)
        if peer is not None:
            peer.close()

    def close_all(self) -> None:
        """End all of them."""
        for key in list(self._running):
            self.close(*key)


def cores_of_this_process() -> list[int]:
    """The cores that may be used."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))
