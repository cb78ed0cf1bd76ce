"""Metrics and intervals against hand values."""

import pytest

from minivlm.scoring.metrics import accuracy, token_accuracy, token_f1
from minivlm.scoring.statistics import clustered_error, macro_interval, mean_interval


def test_accuracy_counts() -> None:
    assert accuracy([True, False, True, True]) == 0.75


def test_accuracy_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no answers"):
        accuracy([])


@pytest.mark.parametrize(
    ("predicted", "reference", "score"),
    [([1, 2, 3, 4], [1, 2, 3, 4], 1.0), ([1, 9, 3], [1, 2, 3, 4], 0.5), ([1, 2, 3, 4], [1, 2], 0.5), ([], [], 1.0)],
)
def test_token_accuracy(predicted: list[int], reference: list[int], score: float) -> None:
    assert token_accuracy(predicted, reference) == score


def test_token_f1_ignores_order_and_counts_repeats() -> None:
    assert token_f1([3, 2, 1], [1, 2, 3]) == 1.0
    assert token_f1([5, 5, 5, 5], [5, 6]) == pytest.approx(2 * 1 / 6)
    assert token_f1([], [1]) == 0.0


def test_interval_is_wilsons_for_independent_answers() -> None:
    # 8 of 10, all from different pictures. se^2 = 10/9 * (8 * .2^2 + 2 * .8^2) / 100 = .017778 -> n_eff = 9.
    # centre (.8 + 3.8415 / 18) / (1 + 3.8415 / 9) = .71026, half width .23647
    mean, low, high = mean_interval([1.0] * 8 + [0.0] * 2, list(range(10)))
    assert (mean, low, high) == pytest.approx((0.8, 0.47379, 0.94672), abs=1e-5)


def test_answers_repeated_on_the_same_picture_add_no_certainty() -> None:
    once = mean_interval([1.0, 0.0, 1.0, 1.0], [0, 1, 2, 3])
    thrice = mean_interval([1.0, 0.0, 1.0, 1.0] * 3, [0, 1, 2, 3] * 3)
    assert thrice == pytest.approx(once)


def test_all_right_is_not_certain() -> None:
    # Wilson at p = 1 with 4 pictures: low = 4 / (4 + 1.96^2).
    mean, low, high = mean_interval([1.0] * 8, [0, 0, 1, 1, 2, 2, 3, 3])
    assert (mean, high) == (1.0, pytest.approx(1.0))
    assert low == pytest.approx(4 / (4 + 3.841459), abs=1e-5)


def test_clustered_error_hand_value() -> None:
    # Sums within clusters: (.5 + .5) / 4 and (-.5 - .5) / 4; 2 / 1 * (1/16 + 1/16) = 1/4.
    assert clustered_error([0.5, 0.5, -0.5, -0.5], [0.25] * 4, ["a", "a", "b", "b"]) == pytest.approx(0.5)


def test_macro_weighs_tasks_equally() -> None:
    scores = {"count": [1.0], "colour": [1.0, 0.0, 0.0, 0.0]}
    mean, low, high = macro_interval(scores, {"count": ["a"], "colour": ["a", "b", "c", "d"]})
    # mean (1 + .25) / 2; weights 1/8: se^2 = 4/3 * (.75^2 + 3 * .25^2) / 64 = .015625
    assert mean == pytest.approx(0.625)
    assert (low, high) == pytest.approx((0.625 - 1.959964 * 0.125, 0.625 + 1.959964 * 0.125))


def test_scores_outside_the_unit_interval_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        mean_interval([0.5, 2.0], [0, 1])
