"""A plugin's own requirement on mm-engine's version is held to when it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import pytest

from mm_engine.contract import contract_version
from mm_engine.errors import StartupError
from mm_engine.plugins.discovery import find, load
from mm_engine.plugins.versions import unmet_range

Install = Callable[..., Path]
ARCH = "TestForConditionalGeneration"
RUNNING = metadata.version("mm-engine")
HOOKS = """
from mm_engine.plugins import hookimpl
from torch import nn
@hookimpl
def model_class(ctx): return nn.Identity
@hookimpl
def max_tokens(ctx, modality): return 4
"""


@pytest.fixture
def requiring(install: Install) -> Callable[..., None]:
    """`requiring(*requirements)`: mm-test 0.3.0, which requires these."""

    def requiring(*requirements: str, source: str = HOOKS) -> None:
        folder = install("mm-test", "0.3.0", {ARCH: "mm_test_one"}, {"mm_test_one.py": source})
        (info,) = folder.glob("*.dist-info")
        with (info / "METADATA").open("a") as file:
            file.writelines(f"Requires-Dist: {text}\n" for text in requirements)

    return requiring


@pytest.mark.parametrize(
    "requirement",
    [
        "mm-engine>=0.1,<0.2",
        "mm-engine",
        "MM_Engine >= 0.1",
        f"mm-engine=={RUNNING}",
        "mm-engine>=9; python_version < '3'",
        "mm-engine>=9; extra == 'new'",
        "mm-engine-kernels>=9",
        "torch>=99",
    ],
)
def test_range_that_holds_the_running_version_loads(
    requiring: Callable[..., None], requirement: str
) -> None:
    requiring(requirement)
    assert unmet_range("mm-test") is None
    assert load(find(ARCH)).hooks == ("model_class", "max_tokens")


@pytest.mark.parametrize(
    "requirement", ["mm-engine<0.3,>=0.2", "mm_engine<0.1", f"mm-engine!={RUNNING}"]
)
def test_range_that_excludes_it_is_refused_before_the_import(
    requiring: Callable[..., None], requirement: str
) -> None:
    requiring("pillow", requirement, source="raise SystemExit")
    with pytest.raises(StartupError) as error:
        load(find(ARCH))
    assert str(error.value) == (
        f"the plugin mm-test 0.3.0 was made for another version of mm-engine: it requires "
        f"{requirement}, and {RUNNING} is installed. "
        "Run: pip install --upgrade mm-engine mm-test"
    )


def test_version_before_a_release_counts_as_within(
    requiring: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    requiring("mm-engine>=0.1,<0.2")
    versions = {"mm-engine": "0.1.5.dev3"}
    monkeypatch.setattr("mm_engine.plugins.versions.metadata.version", versions.__getitem__)
    assert unmet_range("mm-test") is None
    versions["mm-engine"] = "0.2.1"
    assert unmet_range("mm-test") == "mm-engine<0.2,>=0.1"


@pytest.mark.parametrize("requirement", ["mm-engine>=abc", "???"])
def test_requirement_that_cannot_be_read_is_no_reason_to_refuse(
    requiring: Callable[..., None], requirement: str
) -> None:
    requiring(requirement)
    assert unmet_range("mm-test") is None


def test_contract_follows_the_minor_version() -> None:
    assert RUNNING.startswith(f"{contract_version()}.")
