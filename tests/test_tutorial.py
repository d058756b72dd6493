"""The tutorial's code does what it says: checks fail where they are meant to, then none does."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest

from installing import engine, write_distribution
from mm_engine.testing.scaffold import names_of, write_plugin

TUTORIAL = Path(__file__).parents[1] / "docs" / "tutorial.md"


def block(language: str, mark: str, number: int = 0) -> str:
    """The tutorial's block of code that holds `mark`."""
    found = re.findall(rf"^```{language}\n(.*?)^```$", TUTORIAL.read_text("utf-8"), re.M | re.S)
    return [code for code in found if mark in code][number]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """The package `mm_foo` of a new plugin, installed as `failed` looks for it."""
    names = names_of("mm-foo")
    write_plugin(names, tmp_path / "mm-foo")
    write_distribution(
        tmp_path,
        "mm-foo",
        plugins={names.architecture: "mm_foo.plugin"},
        configs={names.architecture: "mm_foo.tiny"},
    )
    return tmp_path / "mm-foo" / "mm_foo"


def failed(package: Path) -> list[str]:
    """The checks that fail."""
    done = engine(
        "plugins", "check", "mm-foo", "--json", path=[package.parent.parent, package.parent]
    )
    results = json.loads(done.stdout)["results"]
    return [result["name"] for result in results if result["status"] == "failed"]


def test_tutorial_fails_where_it_says_and_passes_at_its_end(package: Path) -> None:
    processor = block("json", "GotOcr2ImageProcessor")
    (package / "tiny" / "preprocessor_config.json").write_text(processor)
    assert failed(package) == ["mapper-tensors"]

    (package / "counts.py").write_text(block("python", "def num_image_tokens"))
    model = (package / "model.py").read_text()
    before = model[: model.index("    def embed_images")]
    method = block("python", "torch.cat(list(pixel_values))")
    method = textwrap.indent(method[method.index("def embed_images") :], "    ")
    before = before.replace("from mm_engine.models", "import torch\nfrom mm_engine.models", 1)
    (package / "model.py").write_text(before + method)
    hooks = block("python", "def register_input_mapper")
    (package / "plugin.py").write_text(hooks)
    assert failed(package) == ["max-tokens"]

    wrong = hooks[hooks.index("@hookimpl\ndef max_tokens") : hooks.index("@hookimpl\ndef input_p")]
    corrected = block("python", "max_pictures = ")
    right = corrected[corrected.index("@hookimpl") :] + "\n\n"
    (package / "plugin.py").write_text(hooks.replace(wrong, right))
    assert failed(package) == []
