"""One-file plugins, checked with a tiny checkpoint."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mm_engine.testing import CheckReport, check_plugin

CheckSource = Callable[..., CheckReport]


@pytest.fixture(autouse=True)
def modules_are_forgotten() -> Iterator[None]:
    """Plugins of one test aren't found imported by the next."""
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("mm_test", "mm_engine_file")):
            del sys.modules[name]


@pytest.fixture(scope="session")
def tiny(llava: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small config with its image processor, and neither tokenizer nor weights."""
    folder = tmp_path_factory.mktemp("configs") / "tiny"
    folder.mkdir()
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copyfile(llava / name, folder / name)
    return folder


@pytest.fixture
def check_source(tmp_path: Path, llava: Path) -> CheckSource:
    """`check_source(source, *only)`: the report on a one-file plugin."""

    def check_source(source: str, *only: str, model: Path = llava) -> CheckReport:
        file = tmp_path / "wrong.py"
        file.write_text(source)
        return check_plugin(str(file), str(model), only=only)

    return check_source
