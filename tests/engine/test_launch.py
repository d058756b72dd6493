"""The engine process that is launched ahead of its front's imports."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mm_engine.engine.launch import Launch, launched


def folder_of(launch: Launch) -> Path:
    return Path(launch.address.removeprefix("ipc://")).parent


def test_what_nobody_takes_has_ended_and_left_nothing() -> None:
    launches = []

    def front_that_fails() -> None:
        with launched() as launch:
            assert launch.process.poll() is None
            assert folder_of(launch).is_dir()
            launches.append(launch)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        front_that_fails()
    (launch,) = launches
    assert launch.process.returncode is not None
    assert not folder_of(launch).exists()


def test_to_end_it_twice_is_no_error() -> None:
    with launched() as launch:
        os.kill(launch.process.pid, 9)
        launch.end()
    assert launch.process.returncode == -9
