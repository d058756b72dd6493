"""The kit on plugins that are right: every check passes, and nothing more is asked of an author."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch

from mm_engine.errors import StartupError
from mm_engine.models.packed_weights import pack_encoders
from mm_engine.testing import CheckReport, check_plugin
from mm_engine.testing.oracle import Oracle
from mm_engine.testing.parity import counterpart
from mm_engine.testing.registry import CHECKS
from wrong_plugins import RIGHT, edited

UNKNOWN = """
from transformers import AutoConfig, LlavaConfig

class TestConfig(LlavaConfig):
    model_type = "mm_test_unknown"

AutoConfig.register("mm_test_unknown", TestConfig, exist_ok=True)
"""


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> CheckReport:
    """The report on a right one-file plugin that names a config for its tests."""
    folder = tmp_path_factory.mktemp("right")
    shutil.copytree(tiny, folder / "small")
    (folder / "my_model.py").write_text(RIGHT + '\nTEST_CONFIG = "./small"\n')
    return check_plugin(str(folder / "my_model.py"))


def test_right_plugin_passes_every_check(right: CheckReport) -> None:
    assert [result.name for result in right.results] == list(CHECKS)
    assert {result.name: result.status for result in right.results} == dict.fromkeys(
        CHECKS, "passed"
    )
    assert right.passed and right.failures == ()
    assert right.architecture == "LlavaForConditionalGeneration"
    assert right.plugin.startswith("my_model.py sha256:")
    assert right.checkpoint is not None and right.checkpoint.startswith("random weights for ")


def test_chunks_cut_images_and_the_cache_is_hit(right: CheckReport) -> None:
    details = {result.name: result.detail for result in right.results}
    assert "cuts through images, chunks of 8 tokens" in details["same-in-chunks"]
    assert details["same-from-cache"] == "2 of 2 images from the cache"


def test_unused_weights_are_told_apart_from_lost_ones(right: CheckReport) -> None:
    details = {result.name: result.detail for result in right.results}
    assert "18 unused that answers don't depend on: vision_tower" in details["weights-load"]


def test_json_holds_what_the_report_says(right: CheckReport) -> None:
    content = json.loads(right.to_json())
    assert content["passed"] is True
    assert content["plugin"] == right.plugin
    assert [row["name"] for row in content["results"]] == list(CHECKS)
    assert set(content["results"][0]) == {
        "name", "status", "hook", "place", "expected", "got", "hint", "detail", "seconds",
    }  # fmt: skip


def test_only_runs_what_is_named_and_what_that_needs(tmp_path: Path, llava: Path) -> None:
    file = tmp_path / "right.py"
    file.write_text(RIGHT)
    started: list[str] = []
    report = check_plugin(
        str(file), str(llava), only=["encoder-output"], on_start=lambda name: started.append(name)
    )
    assert [(result.name, result.status) for result in report.results] == [
        ("encoder-output", "passed")
    ]
    assert started == [
        "hooks-fit",
        "checkpoint-opens",
        "model-builds",
        "mapper-tensors",
        "mapper-keys",
        "encoder-output",
    ]


def test_only_shows_the_failure_of_what_it_needed(tmp_path: Path, llava: Path) -> None:
    file = tmp_path / "wrong.py"
    file.write_text(RIGHT.replace("def input_processor", "def input_procesor"))
    report = check_plugin(str(file), str(llava), only=["parity-text"])
    assert [(result.name, result.status) for result in report.results] == [
        ("hooks-fit", "failed"),
        ("parity-text", "skipped"),
    ]
    assert report.results[1].detail == "because hooks-fit failed"


def test_another_layout_on_the_way_to_the_same_rows_is_no_fault(
    tmp_path: Path, llava: Path
) -> None:
    file = tmp_path / "flipped.py"
    given = "super().embed_images(pixel_values=pixel_values)"
    file.write_text(
        edited(
            ("        # tensors\n", "        tensors['pixel_values'] = pixels.flip(0)\n"),
            (given, given.replace("=pixel_values", "=pixel_values.flip(1)")),
        )
    )
    (result,) = check_plugin(str(file), str(llava), only=["parity-pixel-values"]).results
    assert result.status == "passed"
    assert result.detail.startswith("pixel_values: off by up to ")
    assert result.detail.endswith(", but the rows are transformers'")


def test_chunks_that_cannot_cut_an_image_are_said_not_to_be_exercised(
    tmp_path: Path, tiny: Path
) -> None:
    folder = tmp_path / "tiny"
    shutil.copytree(tiny, folder)
    for name in ("config.json", "preprocessor_config.json"):
        file = folder / name
        file.write_text(file.read_text().replace(": 32", ": 8"))
    (tmp_path / "small.py").write_text(
        RIGHT.replace("(48, 48)", "(8, 8)") + 'TEST_CONFIG = "tiny"\n'
    )
    (result,) = check_plugin(str(tmp_path / "small.py"), only=["same-in-chunks"]).results
    assert result.status == "skipped"
    assert result.detail == "not exercised: an image takes 1 token, which no chunk can cut"


def test_module_is_found_by_its_weights_where_names_differ(llava: Path) -> None:
    oracle = Oracle(llava, 4)
    name = "multi_modal_projector"
    model = torch.nn.Module()
    model.connector = copy.deepcopy(oracle.base.get_submodule(name))
    assert counterpart(model, oracle, name) is model.connector
    packed = copy.deepcopy(model)
    pack_encoders(packed)
    assert counterpart(packed, oracle, name) is packed.connector
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert counterpart(model, oracle, name) is None


def test_unknown_check_is_refused() -> None:
    with pytest.raises(StartupError, match="no such check: nonsense. Choose from hooks-fit, "):
        check_plugin("mm-llava", only=["nonsense"])


@pytest.fixture(scope="module")
def unknown_config(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Path:
    """A config of a type that transformers doesn't know."""
    folder = tmp_path_factory.mktemp("unknown")
    shutil.copytree(tiny, folder / "tiny")
    file = folder / "tiny" / "config.json"
    content = json.loads(file.read_text())
    content["model_type"] = "mm_test_unknown"
    file.write_text(json.dumps(content))
    return folder


def test_model_that_transformers_does_not_know_is_checked_without_parity(
    unknown_config: Path,
) -> None:
    file = unknown_config / "unknown.py"
    file.write_text(UNKNOWN + RIGHT + 'TEST_CONFIG = "tiny"\n')
    report = check_plugin(str(file))
    assert report.passed
    results = {result.name: result for result in report.results}
    skipped = {name for name, result in results.items() if result.status == "skipped"}
    assert skipped == {name for name in CHECKS if name.startswith("parity-")}
    assert "transformers has no model for TestConfig" in results["parity-text"].detail
    assert "without transformers' own count" in results["counts"].detail


def test_without_an_oracle_both_who_count_are_named(unknown_config: Path) -> None:
    file = unknown_config / "unknown_wrong.py"
    right = "    # input_processor\n"
    source = RIGHT.replace(right, "    counts = [count - 1 for count in counts]\n")
    file.write_text(UNKNOWN + source + 'TEST_CONFIG = "tiny"\n')
    (failure,) = check_plugin(str(file), only=["counts"]).failures
    assert failure.hook == "input_processor or embed_images"
    assert failure.place is not None and failure.place.count("unknown_wrong.py:") == 2
    assert (failure.expected or "").startswith("16 placeholder tokens for an image of 1x1 pixels")
    assert failure.got == "15"
