"""What the sections of one process share, and running them one after another within limits."""

from __future__ import annotations

import gc
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from checkpoint import make_config
from gpu_sections.measure import Section
from gpu_sections.shapes import Scale
from mm_engine import LLM
from mm_engine.config import EngineConfig

MAX_REASON = 300  # characters
LEAST = 0.2  # of a section's limit: with less time left than this share, it isn't begun


class OutOfTime(KeyboardInterrupt):
    """A section has reached its limit. The engine lets an interrupt through, and nothing else."""


class Run:
    """The device, the sizes, and the model once a section has asked for it."""

    def __init__(self, device: torch.device, scale: Scale, folder: Path, sections: Any) -> None:
        self.device = device
        self.scale = scale
        self.folder = folder  # for the checkpoint
        self.sections: dict[str, Any] = sections  # what is recorded so far
        self.dtype: torch.dtype = getattr(torch, scale.dtype)

    @cached_property
    def checkpoint(self) -> Path:
        """Config, tokenizer and image processor of the model; no weights."""
        scale = self.scale
        make_config(self.folder, vision=scale.vision, text=scale.text, image_size=scale.image_size)
        return self.folder

    @cached_property
    def llm(self) -> LLM:
        """The engine as `LLM` has it by default, on weights drawn at random.

        But that it takes all prompts of a prefill in one step, and finds no prompt again.
        """
        scale = self.scale
        longest = scale.num_patches + max(scale.texts) + max(scale.outputs) + 1
        longest = max(longest, scale.context + 3 * scale.num_steps + 64)
        num_tokens = max(scale.num_requests, *scale.batches) * (-(-longest // 256) * 256)
        step = scale.num_prefills * (scale.num_patches + scale.num_text)
        fields = EngineConfig.__dataclass_fields__
        return LLM(
            str(self.checkpoint),
            dtype=scale.dtype,
            device=self.device.type,
            load_format="dummy",
            max_num_seqs=max(scale.num_requests, *scale.batches),
            max_num_batched_tokens=max(fields["max_num_batched_tokens"].default, step),
            kv_cache_memory=num_tokens * scale.kv_bytes_per_token,
            enable_prefix_caching=False,
            progress=False,
        )

    @property
    def runner(self) -> Any:
        """The part of the engine that computes."""
        return self.llm.engine.runner._runner

    def floor(self, name: str) -> float | None:
        """A figure that the section of floors has measured; None if it hasn't."""
        found = self.sections.get("floors", {}).get("details", {}).get(name)
        return None if found is None else float(found)

    def seconds_of_bytes(self, num_bytes: float) -> float | None:
        """How long copying reads and writes so many bytes."""
        rate = self.floor("copy_bytes_per_second")
        return None if rate is None else num_bytes / rate


def run_sections(
    todo: Mapping[str, tuple[Callable[[Run, Section], None], float]],
    run: Run,
    deadline: float,
    tell: Callable[[], None],
) -> None:
    """Run sections, each within its limit in seconds and before `deadline` (`time.time()`).

    What comes of each goes to `run.sections`; then `tell` is called.
    """
    for name, (section, limit) in todo.items():
        left = deadline - time.time()
        if left < LEAST * limit:
            run.sections[name] = skipped(left)
            tell()
            continue
        found, start, error = Section(), time.perf_counter(), None
        limit = min(limit, left)
        try:
            with limited(limit):
                section(run, found)
        except OutOfTime:
            error = f"it took more than the {limit:.0f} s that it has"
        except Exception as raised:
            error = reason(raised)
        run.sections[name] = {
            "status": "error" if error else "ok",
            **({"error": error} if error else {}),
            "seconds": time.perf_counter() - start,
            "rows": [row.to_json() for row in found.rows],
            "details": found.details,
        }
        del found
        tell()
        gc.collect()
        if run.device.type == "cuda":
            try:
                torch.cuda.empty_cache()
            except RuntimeError:  # a kernel's fault ends all that this process does on the card
                continue


def skipped(left: float) -> dict[str, Any]:
    """The record of a section that wasn't begun."""
    return {"status": "skipped", "error": f"{max(0, left):.0f} s were left", "rows": []}


def reason(error: BaseException) -> str:
    """An exception in one line."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {first}"[:MAX_REASON]


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in here after so many seconds; where there are no signals, never.

    What holds the interpreter is not cut short: for that, a section's process has an end.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    # Again and again: a destructor that is running would swallow it.
    signal.setitimer(signal.ITIMER_REAL, max(0.001, seconds), 10.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
