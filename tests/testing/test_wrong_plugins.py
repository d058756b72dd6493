"""Each check fails on a plugin that is wrong in just that, and names the hook and the numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from checked_plugins import WRONG
from mm_engine.plugins.blame import num_hanging_calls
from mm_engine.testing import CheckReport, check_plugin
from mm_engine.testing import subject as subject_module
from mm_engine.testing.registry import CHECKS
from serving import wait_until
from wrong_plugins import WRONG_PLUGINS, end_hanging

CheckSource = Callable[..., CheckReport]


@pytest.mark.parametrize("name", WRONG)
def test_wrong_plugin_fails_the_check_that_says_why(name: str, check_source: CheckSource) -> None:
    check, hook, expected, got, source = WRONG[name]
    report = check_source(source, check)
    (failure,) = report.failures
    assert (failure.name, failure.hook) == (check, hook)
    assert expected in (failure.expected or "")
    assert got in (failure.got or "")
    if hook is not None:
        assert "wrong.py:" in (failure.place or "") or "wrong.Model" in (failure.place or "")


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_has_a_plugin_that_fails_it(check: str) -> None:
    assert check in {wrong[0] for wrong in WRONG.values()}


def test_hint_names_the_hidden_state_that_was_taken(check_source: CheckSource) -> None:
    source = WRONG["another-feature-layer"][-1]
    (failure,) = check_source(source, "parity-tower").failures
    assert failure.hint is not None
    assert "these are hidden state 3 of 3, transformers takes 2" in failure.hint


def test_hint_says_which_rows_were_taken(check_source: CheckSource) -> None:
    source = WRONG["class-token-kept"][-1]
    (failure,) = check_source(source, "parity-tower").failures
    assert failure.got == "shape [1, 17, 32] instead of [1, 16, 32]"
    assert (
        failure.hint
        == "all rows, where transformers takes all rows but the first (the class token)"
    )


def test_hint_asks_for_a_batch_dimension_that_was_kept(check_source: CheckSource) -> None:
    (failure,) = check_source(WRONG["mapper-keeps-the-batch-dimension"][-1], "counts").failures
    assert failure.hint == (
        "the mapper's pixel_values is [1, 3, 32, 32], as the image processor gives it for a "
        "batch of one image: is the batch dimension still there?"
    )


def test_misspelt_hook_comes_with_the_right_name(check_source: CheckSource) -> None:
    (failure,) = check_source(WRONG_PLUGINS["hook-misspelt"].source, "hooks-fit").failures
    assert failure.hint == "Did you mean input_processor(ctx, inputs)?"


def test_hook_that_hangs_is_given_up_on(
    check_source: CheckSource, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(subject_module, "HOOK_TIMEOUT", 2.0)
    report = check_source(WRONG_PLUGINS["mapper-hangs"].source)
    assert num_hanging_calls(), "nobody waited for it"
    end_hanging(tmp_path / "wrong.py")
    wait_until(lambda: not num_hanging_calls(), "the hook to end")
    (failure,) = report.failures
    assert (failure.name, failure.hook) == ("mapper-tensors", "register_input_mapper")
    assert failure.got == "took longer than 2 s"


@pytest.mark.parametrize("name", ["encoder-interrupts", "mapper-interrupts", "encoder-exits"])
def test_plugin_cannot_end_the_kit(name: str, check_source: CheckSource) -> None:
    report = check_source(WRONG_PLUGINS[name].source, "encoder-output")
    assert [failure.hook for failure in report.failures] == [WRONG_PLUGINS[name].cause]


def test_checks_go_on_after_a_failure_and_skip_what_it_makes_meaningless(
    tmp_path: Path, llava: Path
) -> None:
    file = WRONG_PLUGINS["rows-one-too-few"].write(tmp_path)
    report = check_plugin(str(file), str(llava))
    results = {result.name: result for result in report.results}
    assert list(results) == list(CHECKS)
    assert {failure.name for failure in report.failures} == {"counts", "parity-image-rows"}
    assert results["encoder-output"].status == "passed"
    assert results["same-in-chunks"].detail == "because counts failed"
    assert results["parity-projector"].status == "passed"
    assert results["parity-text"].detail == "because parity-image-rows failed"
