"""Recordings: what is made again is what was recorded, and what can't be is refused."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch
from mm_engine_kernels import _cpu, ops
from mm_engine_kernels.cpu.recording import NotRecorded, Recorder

SIZE = 40


class Layer:
    """A function of the kernels over tensors that stay where they are."""

    def __init__(self, num: int) -> None:
        random = torch.Generator().manual_seed(num)
        self.x = torch.randn(num, SIZE, generator=random)
        self.out = torch.zeros(num, SIZE)
        self.norm = torch.ones(SIZE)
        self.weight = torch.randn(2 * SIZE, SIZE, generator=random) / 8
        self.linear = ops.pack_linear(self.weight)
        assert self.linear is not None

    def __call__(self) -> None:
        assert self.linear is not None
        x, residual = ops.rms_norm(self.x, self.norm, 1e-5), self.x
        for _ in range(3):
            x = ops.silu_mul(self.linear(x))
            x, residual = ops.add_rms_norm(x, residual, self.norm, 1e-5)
        self.out.copy_(x.view(-1, 2, SIZE // 2).flatten(1))


def test_it_does_again_what_was_recorded_with_the_numbers_of_the_day() -> None:
    layer, recorder = Layer(5), Recorder()
    with torch.inference_mode():
        run = recorder(layer)
        assert not layer.out.any(), "it was computed"
        for i in range(3):
            layer.x += i
            run()
            got = layer.out.clone()
            layer.out.zero_()
            layer()
            assert torch.equal(got, layer.out)
            assert got.any()


def test_recordings_share_their_memory_and_do_not_mix() -> None:
    recorder, layers = Recorder(), [Layer(9), Layer(4), Layer(1)]
    runs = []
    for layer in layers:
        runs.append(recorder(layer))
        if layer is layers[0]:
            taken = recorder.num_bytes
            assert taken < 8 * 9 * 2 * SIZE * 4  # of three rounds of tensors, one is kept
    assert recorder.num_bytes == taken
    for _ in range(2):
        for layer, run in zip(layers, runs, strict=True):
            run()
            got = layer.out.clone()
            layer()
            assert torch.equal(got, layer.out)


def test_the_memory_lives_as_long_as_the_recording() -> None:
    layer = Layer(3)
    run = Recorder()(layer)
    others = [torch.full((3, 2 * SIZE), float("nan")) for _ in range(50)]
    run()
    assert layer.out.isfinite().all()
    assert all(other.isnan().all() for other in others)


X = torch.randn(3, SIZE)


@pytest.mark.parametrize(
    "function",
    [
        lambda: X + 1,
        lambda: X.tolist(),
        lambda: X[0, 0].item(),
        lambda: float(X[0, 0]),
        lambda: int(X[0, 0]),
        lambda: bool(X[0, 0]),
        lambda: range(torch.tensor(3)),
        lambda: X.numpy(),
        lambda: list(map(float, X[0])),
        lambda: torch.zeros(3),
        lambda: X.t().contiguous(),
        lambda: X.copy_(X.t()[:3, :1]),
        lambda: X.copy_(X.half()),
        lambda: X.nonzero(),
        lambda: ops.rms_norm(X.half(), torch.ones(SIZE).half(), 1e-5),
        lambda: ops.linear(X, X),
        lambda: torch.empty(3, 4).t().new_empty((2, 2)).fill_(1),
    ],
)
def test_what_can_not_be_repeated_is_refused(function: Callable[[], object]) -> None:
    before = X.clone()
    with pytest.raises(NotRecorded, match=r"^\S.*\w$"):
        Recorder()(function)  # type: ignore[arg-type]  # whatever it returns
    assert torch.equal(X, before)
    layer = Layer(2)
    layer()  # nothing is recorded any more
    assert layer.out.any()


def test_a_row_that_is_not_there_is_refused_at_each_run() -> None:
    table, rows, out = torch.randn(4, 8), torch.tensor([1]), torch.zeros(1, 8)
    run = Recorder()(lambda: out.copy_(ops.gather_rows(table, rows, torch.float32)))  # type: ignore[arg-type]
    run()
    assert torch.equal(out[0], table[1])
    rows.fill_(4)
    with pytest.raises(IndexError):
        run()
    rows.fill_(0)
    run()
    assert torch.equal(out[0], table[0])


def test_other_threads_compute_meanwhile() -> None:
    layer, other = Layer(3), Layer(2)
    inside, done = threading.Event(), threading.Event()

    def compute() -> None:
        inside.wait(10)
        other()
        done.set()

    thread = threading.Thread(target=compute)
    thread.start()

    def recorded() -> None:
        inside.set()
        assert done.wait(10)
        layer()

    Recorder()(recorded)
    thread.join()
    assert other.out.any() and not layer.out.any()


def test_one_recording_at_a_time() -> None:
    layer = Layer(2)

    def nested() -> None:
        Recorder()(layer)

    with pytest.raises(RuntimeError, match="on already"):
        Recorder()(nested)
    recording = _cpu.Recording()
    recording.start()
    del recording  # a thread isn't left recording into nothing
    layer()
    assert layer.out.any()


def test_what_the_kernels_raise_ends_the_recording() -> None:
    layer, wide = Layer(2), torch.randn(2, SIZE + 1)

    def fails() -> None:
        layer()
        assert layer.linear is not None
        layer.linear(wide)

    with pytest.raises(ValueError, match="columns"):
        Recorder()(fails)
    layer()
    assert layer.out.any()


def test_a_program_that_ends_with_a_recording_is_not_warned() -> None:
    """As one does whose `LLM` is still there."""
    code = """
import ctypes
from mm_engine_kernels import _cpu
kept = _cpu.Recording()
ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))
print("made")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "made\n", "")
