"""The reference pages say what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

DOCS = Path(__file__).parents[1] / "docs"


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_docs", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["hooks.md", "cli.md"])
def test_reference_page_is_as_generated(name: str) -> None:
    written = (DOCS / "reference" / name).read_text("utf-8")
    assert written == generator().PAGES[name](), f"{name} is behind the code: run `make docs`"
