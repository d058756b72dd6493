"""What counts as rounding, and what is said of what doesn't."""

from __future__ import annotations

import pytest
import torch

from mm_engine.testing.compare import difference, first_untied

ROWS = torch.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rounding_is_no_difference_at_any_scale(scale: float) -> None:
    noise = 1e-6 * scale * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    assert difference(ROWS * scale, ROWS * scale + noise) is None


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_difference_says_how_much_and_where(scale: float) -> None:
    got = ROWS.clone() * scale
    got[2, 1] += 0.5 * scale
    got[3] += 0.01 * scale
    said = difference(ROWS * scale, got)
    assert said is not None
    assert f"off by up to {0.5 * scale:.3g} where numbers go up to {11 * scale:.3g}" in said
    assert "2 of 4 rows differ, the first is row 2; most at row 2, column 1" in said


def test_numbers_far_below_one_are_compared_with_each_other() -> None:
    assert difference(ROWS * 1e-5, ROWS * 1.1e-5) is not None
    assert difference(ROWS * 0, ROWS * 0) is None
    assert difference(ROWS * 0, torch.full_like(ROWS, 1e-11)) is None  # all zeros but for dust


def test_a_tie_is_one_beside_its_own_logits() -> None:
    small = torch.tensor([0.0, 5e-5, 3e-5])
    assert first_untied([2], [1], [small]) == (0, pytest.approx(2e-5))
    assert first_untied([2], [1], [torch.tensor([0.0, 5e-5, 5e-5 - 1e-8])]) is None
    assert first_untied([2], [1], [torch.zeros(3)]) is None


def test_another_layout_of_the_same_rows_is_equal() -> None:
    assert difference(ROWS[None], ROWS) is None


def test_another_number_of_rows_is_said_by_shape() -> None:
    assert difference(ROWS, ROWS[1:]) == "shape [3, 3] instead of [4, 3]"
    assert difference(ROWS, ROWS.reshape(3, 4)) == "shape [3, 4] instead of [4, 3]"


def test_nan_is_a_difference() -> None:
    assert difference(ROWS, ROWS * float("nan")) == "NaN or infinity"


def test_half_precision_is_a_difference() -> None:
    rows = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert difference(rows, rows.half().float()) is not None
    assert difference(rows, rows.bfloat16().float()) is not None


def test_answers_part_where_no_tie_excuses_it() -> None:
    logits = [torch.tensor([0.0, 5.0, 1.0]), torch.tensor([0.0, 5.0, 4.0])]
    assert first_untied([1, 1], [1, 1], logits) is None
    assert first_untied([1, 2], [1, 1], logits) == (1, 1.0)


def test_after_a_tie_answers_may_go_their_own_ways() -> None:
    logits = [torch.tensor([0.0, 5.0, 5.0 - 1e-6]), torch.tensor([9.0, 0.0, 0.0])]
    assert first_untied([2, 1], [1, 0], logits) is None


def test_an_answer_that_ends_early_differs() -> None:
    assert first_untied([1, 1], [1], [torch.tensor([0.0, 1.0])]) == (1, 0.0)
