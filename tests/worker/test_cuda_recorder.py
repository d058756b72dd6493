"""What is asked of `torch.cuda` to capture a graph; a fake stands for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mm_engine.errors import PluginError
from mm_engine.worker.graphs import CaptureFailed, CudaRecorder


class FakeCuda:
    """What `CudaRecorder` calls of `torch.cuda`, in the order in which it does."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.stream_now = "main"

    def say(self, event: str) -> None:
        self.events.append(event)

    def patch(self, patch: pytest.MonkeyPatch, *, fails: bool = False) -> None:
        fake = self

        class Stream:
            def __init__(self, name: Any = None) -> None:
                self.name = name if name == "main" else "side"
                self.device_index = 0

            def wait_stream(self, other: Stream) -> None:
                fake.say(f"{self.name} waits for {other.name}")

        class Graph:
            def replay(self) -> None:
                fake.say("replay")

        @contextmanager
        def stream(to: Stream) -> Iterator[None]:
            before, fake.stream_now = fake.stream_now, to.name
            yield
            fake.stream_now = before

        @contextmanager
        def graph(
            _: Graph, *, pool: str, stream: Stream, capture_error_mode: str
        ) -> Iterator[None]:
            fake.say(f"begin in {pool}, {capture_error_mode}")
            fake.stream_now = stream.name
            yield
            if fails:
                raise RuntimeError("the capture is invalid")
            fake.say("end")
            fake.stream_now = "main"

        def set_stream(to: Stream) -> None:
            fake.stream_now = to.name

        for name, value in {
            "Stream": Stream,
            "CUDAGraph": Graph,
            "stream": stream,
            "graph": graph,
            "set_stream": set_stream,
            "current_stream": lambda: Stream("main"),
            "graph_pool_handle": lambda: "a pool",
        }.items():
            patch.setattr(torch.cuda, name, value)
        ends = "_cuda_endAllocateToPool"  # a PyTorch for CPUs has none

        def end_allocating(device_index: int, pool: str) -> None:
            fake.say(f"device {device_index} allocates no more in {pool}")

        patch.setattr(torch._C, ends, end_allocating, raising=False)


def test_a_capture_follows_a_run_aside_and_shares_one_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    fake.patch(monkeypatch)
    record = CudaRecorder(torch.device("cpu"))
    replay = record(lambda: fake.say(f"run in {fake.stream_now}"))
    replay()
    assert fake.events == [
        "side waits for main",
        "run in side",
        "main waits for side",
        "begin in a pool, thread_local",
        "run in side",
        "end",
        "replay",
    ]


def test_a_capture_that_fails_leaves_the_stream_that_was_in_force(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeCuda()
    fake.patch(monkeypatch, fails=True)
    with pytest.raises(RuntimeError, match="invalid"):
        CudaRecorder(torch.device("cpu"))(lambda: None)
    assert fake.stream_now == "main"
    assert fake.events[-1] == "device 0 allocates no more in a pool"


def test_what_the_models_own_code_raised_is_the_cause() -> None:
    try:
        try:
            try:
                raise TypeError("a sync")
            except TypeError as error:
                raise PluginError("forward raised") from error
        finally:
            raise RuntimeError("broken off")
    except RuntimeError as error:
        failed = CaptureFailed.of(error)
    assert str(failed) == "TypeError: a sync" and not failed.no_memory
