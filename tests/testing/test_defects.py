"""Defects put into mm-llava-next one at a time: each is found, and the right hook is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from checkpoints import make_llava_next
from defects import DEFECTS, in_one_file
from mm_engine.testing import CheckReport

CheckSource = Callable[..., CheckReport]


@pytest.fixture(scope="module")
def llava_next(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of small tiles in the published grids."""
    return make_llava_next(tmp_path_factory.mktemp("llava-next"))


def test_without_a_defect_nothing_is_found(check_source: CheckSource, llava_next: Path) -> None:
    report = check_source(in_one_file(), model=llava_next)
    assert report.passed
    assert all(result.status == "passed" for result in report.results)


def test_what_follows_from_a_renamed_key_is_not_blamed_on_others(
    check_source: CheckSource, llava_next: Path
) -> None:
    report = check_source(DEFECTS["mapper key renamed"].source(), model=llava_next)
    assert [failure.name for failure in report.failures] == ["mapper-keys"]
    details = {result.name: result.detail for result in report.results}
    assert details["processor"] == "because mapper-keys failed"  # it reads the tensors, too


def test_a_model_that_lacks_keywords_of_the_default_mapper_may_have_a_mapper(
    check_source: CheckSource, llava_next: Path
) -> None:
    signature = "self, *, pixel_values: Tensor | list[Tensor], image_sizes: Tensor\n    "
    source = in_one_file()
    assert signature in source
    source = source.replace(signature, "self, *, pixel_values: Tensor | list[Tensor]\n    ")
    (failure,) = check_source(source, "mapper-keys", model=llava_next).failures
    assert failure.hook == "embed_images"
    assert "or register a mapper that returns only what the model takes" in (failure.hint or "")


@pytest.mark.parametrize("name", DEFECTS)
def test_defect_is_found_and_the_right_hook_named(
    name: str, check_source: CheckSource, llava_next: Path
) -> None:
    defect = DEFECTS[name]
    report = check_source(defect.source(), defect.check, model=llava_next)
    (failure,) = report.failures
    assert (failure.name, failure.hook) == (defect.check, defect.hook)
    assert failure.expected and failure.got and "wrong.py:" in (failure.place or "")


def test_dummy_of_smaller_images_is_told_from_a_short_one(
    check_source: CheckSource, llava_next: Path
) -> None:
    source = DEFECTS["dummy not the costliest"].source()
    (failure,) = check_source(source, "dummy-data", model=llava_next).failures
    assert failure.expected == "images that take 88 tokens each (what max_tokens says)"
    assert failure.got == "one that takes 36"


def test_the_page_on_record_names_the_same_hooks() -> None:
    page = Path(__file__).parents[2] / "docs" / "defects.md"
    rows = [line.split(" | ") for line in page.read_text("utf-8").splitlines() if " | `" in line]
    recorded = {row[0].removeprefix("| "): row[2].strip("`") for row in rows}
    assert recorded == {name: defect.hook for name, defect in DEFECTS.items()}
