"""Ctrl-C while an answer comes: once it ends the answer, again it doesn't disturb the ending."""

from __future__ import annotations

import signal
from contextlib import nullcontext

import pytest

from mm_engine.cli.chat.session import one_interrupt


def stop_twice() -> list[str]:
    """What happens at Ctrl-C, and at another while the first one's work is done."""
    happened = []
    try:
        signal.raise_signal(signal.SIGINT)
    finally:
        happened.append("stopped")
        signal.raise_signal(signal.SIGINT)
        happened.append("cleaned up")
        raise KeyboardInterrupt(happened)


@pytest.mark.parametrize("guarded", [True, False])
def test_only_the_first_interrupts(guarded: bool) -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt) as raised, one_interrupt() if guarded else nullcontext():
        stop_twice()
    assert raised.value.args == ((["stopped", "cleaned up"],) if guarded else ())
    assert signal.getsignal(signal.SIGINT) is before


def test_each_answer_can_be_interrupted() -> None:
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt), one_interrupt():
            signal.raise_signal(signal.SIGINT)
